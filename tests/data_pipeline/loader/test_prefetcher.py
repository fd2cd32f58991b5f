"""Remote sources through the node cache: same batches as from files, few requests, each unit once per node."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import storage
from data_pipeline.batches.spec import SourceSpec
from data_pipeline.batches.work_items import BuilderSetup
from data_pipeline.index.build import build_index
from data_pipeline.loader import prefetcher
from data_pipeline.loader.prefetcher import MAX_STARTS, Position, Prefetcher
from data_pipeline.storage.cache import Cache, CacheSettings
from data_pipeline.stream import Stream
from tests.data_pipeline.loader.test_loader import wait_until
from tests.support.faulty_proxy import Proxy
from tests.support.s3_server import faulty_s3
from tests.support.samples import LENGTH, write_packed

COUNTS = [400] * 6 + [7, 0, 1] + [400] * 3
SAMPLES = sum(COUNTS)
BATCH = 20
STEPS = -(-SAMPLES // BATCH)


@dataclass
class Source:
    """The same tars in a folder and in a bucket, indexed in both."""

    local: str
    remote: str
    proxy: Proxy
    bytes: int


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    folder = write_packed(tmp_path_factory.mktemp("source"), COUNTS)
    build_index(str(folder))
    with faulty_s3() as (root, proxy):
        for path in folder.rglob("*"):
            if path.is_file():
                storage.publish(f"{root}/{path.relative_to(folder)}", path.read_bytes())
        yield Source(str(folder), root, proxy, sum(path.stat().st_size for path in folder.glob("*.tar")))


@pytest.fixture
def counted(source: Source) -> Source:
    source.proxy.reset_counters()
    return source


def stream(path: str, folder: Path, gigabytes: float = 1.0, **more: object) -> Stream:
    cache = CacheSettings.of(str(folder / "cache"), gigabytes)
    return Stream({"a": SourceSpec(path)}, BATCH, length=LENGTH, cache=cache, **more)  # type: ignore[arg-type]


def digests(source: Stream, steps: int) -> list[tuple[int, int, int]]:
    batches = [next(source) for _ in range(steps)]
    return [(batch.batch_digest, batch.order_digest, int(batch.tokens.sum())) for batch in batches]


@pytest.fixture(scope="module")
def truth(source: Source, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, int, int]]:
    """Digests of one epoch from local files."""
    with stream(source.local, tmp_path_factory.mktemp("unused")) as local:
        return digests(local, STEPS)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_costs_few_requests_and_no_bytes_twice(
    counted: Source, truth: list[tuple[int, int, int]], tmp_path: Path, workers: int
) -> None:
    with stream(counted.remote, tmp_path, workers=workers) as remote:
        first = digests(remote, 1)
        # Until then samples are read alone: as many as the loader reads while the prefetcher's process starts.
        wait_until(lambda: not list((tmp_path / "cache").rglob("warming-*")), 60)
        assert first + digests(remote, STEPS - 1) == truth
    gets, size = counted.proxy.tars()
    assert 0 < gets <= 0.03 * SAMPLES
    assert 0.9 * counted.bytes < size <= 1.1 * counted.bytes
    assert [n for key, n in counted.proxy.gets.items() if "/offsets-" in key] == [
        1
    ]  # all processes map one file

    # All of it is on the node now: the next epoch asks for nothing.
    counted.proxy.reset_counters()
    with stream(counted.remote, tmp_path, workers=workers) as remote:
        assert digests(remote, STEPS) == truth
    assert counted.proxy.tars() == (0, 0)


def test_the_ranks_of_a_node_download_each_unit_once(
    counted: Source, truth: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    ranks = [stream(counted.remote, tmp_path, rank=rank, world_size=2, workers=1) for rank in range(2)]
    try:
        found = zip(*(digests(rank, STEPS) for rank in ranks), strict=True)
        totals = [tuple((a + b) % 2**64 for a, b in zip(*step, strict=True)) for step in found]
    finally:
        for rank in ranks:
            rank.close()
    assert totals == truth
    units = Counter(entry for entry in counted.proxy.log if entry[0].endswith(".tar") and _long(entry[1]))
    assert units
    assert max(units.values()) == 1


def _long(asked: str) -> bool:
    """True for a range of more than one sample."""
    first, last = map(int, asked.removeprefix("bytes=").split("-"))
    return last + 1 - first > 2048


def test_where_the_source_does_not_fit_its_units_are_its_runs(
    counted: Source, truth: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    gigabytes = 0.3 * counted.bytes / 1e9
    with stream(counted.remote, tmp_path, gigabytes, workers=1) as remote:
        assert digests(remote, 12) == truth[:12]
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and len(path.name) == 32]
    assert kept
    assert sum(path.stat().st_size for path in kept) <= 0.31 * counted.bytes


def test_without_a_cache_every_sample_is_one_request(
    counted: Source, truth: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    with stream(counted.remote, tmp_path, 0.0) as remote:
        assert digests(remote, 5) == truth[:5]
    gets, _ = counted.proxy.tars()
    assert 5 * BATCH <= gets <= 8 * BATCH  # the loader is ahead
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_stops_nobody(
    counted: Source, truth: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_bytes(b"no folder")
    with pytest.warns(UserWarning, match="cannot be used"), stream(counted.remote, tmp_path) as remote:
        assert digests(remote, 3) == truth[:3]


def test_a_prefetcher_that_is_killed_is_replaced_and_nothing_changes(
    counted: Source, truth: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    with stream(counted.remote, tmp_path, workers=1) as remote:
        found: list[tuple[int, int, int]] = []
        killed = set()
        for step in range(STEPS):
            found += digests(remote, 1)
            prefetcher = remote._loader._prefetcher
            assert prefetcher is not None
            if step in (0, 3, 9):
                killed.add(prefetcher.pid)
                os.kill(prefetcher.pid, signal.SIGKILL)
                prefetcher._process.wait()
        assert found == truth
        assert len(killed) == 3
        assert prefetcher is not None
        assert prefetcher._process.poll() is not None  # it is started three times, not for ever
        assert not list((tmp_path / "cache").glob("warming-*"))


def test_signals_of_the_job_do_not_end_the_prefetcher(
    counted: Source, truth: list[tuple[int, int, int]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C and Slurm's warning reach every process, also one that is just starting."""
    with stream(counted.remote, tmp_path) as remote:
        prefetcher = remote._loader._prefetcher
        assert prefetcher is not None
        pid = prefetcher.pid
        for step in range(2):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                os.kill(pid, number)
            assert digests(remote, 1) == truth[step : step + 1]
            wait_until(lambda: not list((tmp_path / "cache").rglob("warming-*")), 60)
        assert prefetcher.pid == pid
        assert prefetcher._process.poll() is None
    assert capfd.readouterr().err == ""


def test_a_run_goes_on_anywhere_with_what_is_cached(
    counted: Source, truth: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    with stream(counted.remote, tmp_path) as remote:
        digests(remote, 20)
        saved = remote.state()
    with stream(counted.remote, tmp_path, workers=1) as remote:
        remote.resume(saved)
        assert digests(remote, 20) == truth[20:40]


def test_a_mixture_of_local_and_remote_sources(counted: Source, tmp_path: Path) -> None:
    found = []
    for first, second in ((counted.local, counted.local), (counted.remote, counted.local)):
        sources = {"a": SourceSpec(first, weight=3), "b": SourceSpec(second, weight=1)}
        cache = CacheSettings.of(str(tmp_path / "cache"), 1)
        with Stream(sources, BATCH, length=LENGTH, cache=cache, workers=1) as mixture:
            found.append(digests(mixture, 30))
    assert found[0] == found[1]
    assert counted.proxy.tars()[0]


def test_tars_without_an_index_are_fetched_once_a_node(
    source: Source, truth: list[tuple[int, int, int]], tmp_path: Path
) -> None:
    bare = f"{source.remote}/bare"
    for path in sorted(Path(source.local).glob("*.tar")):
        storage.publish(f"{bare}/{path.name}", path.read_bytes())
    with stream(bare, tmp_path) as remote:  # counts the samples of every tar
        source.proxy.reset_counters()
        assert digests(remote, STEPS) == truth
    gets, size = source.proxy.tars()
    assert gets <= len(COUNTS)
    assert size <= 1.02 * source.bytes


def test_only_streams_with_something_to_fetch_have_a_prefetcher(source: Source, tmp_path: Path) -> None:
    with stream(source.local, tmp_path) as local:
        assert local._loader._prefetcher is None
    with stream(source.remote, tmp_path, 0.0) as uncached:
        assert uncached._loader._prefetcher is None
    with stream(source.remote, tmp_path) as remote:
        prefetcher = remote._loader._prefetcher
        assert isinstance(prefetcher, Prefetcher)
        pid = prefetcher.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_prefetcher_that_cannot_go_on_ends_and_lets_whole_units_be_read(
    counted: Source, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Otherwise readers would keep reading single samples and wait for its first window."""
    with stream(counted.remote, tmp_path) as remote:
        setup = BuilderSetup.of(remote._builder)
        begun = Prefetcher.start_if_useful([setup], 0, 1)
        assert begun is not None
        cache = Cache(setup.cache or CacheSettings.of())
        assert cache.warming()
        try:
            begun.begin("x", 1)  # type: ignore[arg-type]  # its planning thread cannot count from there
            for _ in range(MAX_STARTS):
                assert begun._process.wait(30) == 1
                assert cache.warming()
                begun.advance(0)
            assert not cache.warming()
        finally:
            begun.close()
    assert "Traceback" in capfd.readouterr().err


def test_a_prefetcher_whose_index_is_gone_says_so_in_a_line(
    counted: Source, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with stream(counted.remote, tmp_path) as remote:
        setup = BuilderSetup.of(remote._builder)
    (manifest,) = setup.manifests.values()
    assert manifest.offsets is not None
    gone = replace(manifest, offsets=replace(manifest.offsets, url=f"{manifest.offsets.url}.gone"))
    begun = Prefetcher.start_if_useful([replace(setup, manifests={"a": gone})], 0, 1)
    assert begun is not None
    try:
        assert begun._process.wait(30) == 1
    finally:
        begun.close()
    said = capfd.readouterr().err
    assert "no samples are fetched ahead: " in said
    assert ".gone is gone" in said
    assert "Traceback" not in said


def test_units_that_no_later_step_needs_are_released(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plan:
        """Nothing to fetch; step n needs unit n."""

        is_waiting = False

        def __init__(self, *_: object) -> None:
            self.first = 0

        def single_sample_steps(self) -> int:
            return 2

        def next_group(self, step: int, last: int) -> None:
            return None

        def next_fetch(self) -> None:
            return None

        def release_before(self, step: int) -> list[str]:
            released = [f"unit {number}" for number in range(self.first, step)]
            self.first = max(self.first, step)
            return released

    class RecordingCache:
        def __init__(self) -> None:
            self.released: list[str] = []
            self.warming: list[bool] = []

        def release(self, unit: str) -> None:
            self.released.append(unit)

        def set_warming(self, warming: bool) -> None:
            self.warming.append(warming)

    monkeypatch.setattr(prefetcher, "PrefetchPlan", Plan)
    downloader = prefetcher._Downloader.__new__(prefetcher._Downloader)
    downloader._builders, downloader._rank, downloader._world_size, downloader._limit = [], 0, 1, 1
    downloader._changed, downloader._position = threading.Condition(), None
    downloader._in_flight = downloader._changes = 0
    cache: Any = RecordingCache()
    downloader._cache = cache
    begun = Position(0, 9, 0)
    downloader.set_position(begun)
    thread = threading.Thread(target=downloader._serve_pass, args=(None, begun), daemon=True)
    thread.start()
    for step in (1, 4):
        downloader.set_position(Position(0, 9, step))
        wait_until(lambda step=step: len(cache.released) == step)  # type: ignore[misc]
    assert cache.released == [f"unit {number}" for number in range(4)]
    assert set(cache.warming) == {False}
    downloader.set_position(Position(5, 9, 5))  # another pass ends this one
    thread.join(10)
    assert not thread.is_alive()
