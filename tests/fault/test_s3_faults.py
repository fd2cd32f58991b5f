"""S3 that answers 503, stalls, truncates or resets, and processes killed in the middle: the batches of local files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_pipeline import storage
from data_pipeline.batches.spec import Batch, SourceSpec
from data_pipeline.errors import ReadError, UserError
from data_pipeline.index.build import build_index
from data_pipeline.storage import object_store
from data_pipeline.storage.cache import CacheSettings
from data_pipeline.stream import Stream
from data_pipeline.transforms.decode import ImageSpec
from data_pipeline.transforms.text_formats import TextSpec
from tests.support.faulty_proxy import KINDS, Proxy
from tests.support.s3_server import faulty_s3
from tests.support.samples import LENGTH, SIZE, members, write_source, write_tokenizer

COUNTS = [150] * 5 + [1, 0, 40]
BATCH = 24
STEPS = -(-sum(COUNTS) // BATCH)
# One sample cannot be decoded: it is replaced, by the same other one from S3 as from files.
SPOILED = {(2, 17): members(2, 17) | {"png": b"no image"}}


@dataclass
class Source:
    """The same tars in a folder and in a bucket, with an index and without."""

    folder: Path
    root: str
    proxy: Proxy


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    base = tmp_path_factory.mktemp("faults")
    folder = write_source(base / "source", COUNTS, replace=SPOILED)
    build_index(str(folder))
    write_tokenizer(base / "tokenizer")
    with faulty_s3(seed=3) as (root, proxy):
        for path in folder.rglob("*"):
            if path.is_file():
                storage.publish(f"{root}/indexed/{path.relative_to(folder)}", path.read_bytes())
                if path.suffix == ".tar":
                    storage.publish(f"{root}/bare/{path.name}", path.read_bytes())
        yield Source(folder, root, proxy)


@pytest.fixture
def faults(source: Source, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    """A tenth of the requests fail."""
    source.proxy.reset_counters()
    source.proxy.rate, source.proxy.kinds = 0.1, KINDS
    monkeypatch.setenv("DROMOS_READ_TIMEOUT", "0.4")
    object_store.clear_filesystems()
    yield source
    source.proxy.rate = 0.0
    object_store.clear_filesystems()


def stream(source: Source, path: str, cache: Path, gigabytes: float = 1.0, workers: int = 0) -> Stream:
    return Stream(
        {"a": SourceSpec(path)},
        BATCH,
        image=ImageSpec(SIZE, (0.4, 1.0), True),
        text=TextSpec(str(source.folder.parent / "tokenizer"), LENGTH),
        workers=workers,
        cache=CacheSettings.of(str(cache), gigabytes),
    )


def told(batch: Batch) -> tuple[object, ...]:
    return batch.batch_digest, batch.order_digest, batch.skipped, batch.samples


@pytest.fixture(scope="module")
def truth(source: Source, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[object, ...]]:
    with stream(source, str(source.folder), tmp_path_factory.mktemp("unused")) as local:
        found = [told(next(local)) for _ in range(STEPS)]
    assert [skipped for _, _, skipped, _ in found if skipped] == [{"a": {"undecodable": 1}}]
    return found


@pytest.mark.parametrize(
    ("kind", "workers", "gigabytes"),
    [("indexed", 0, 1.0), ("indexed", 2, 0.0), ("bare", 0, 0.0), ("bare", 2, 1.0)],
)
def test_where_a_tenth_of_the_requests_fail_the_batches_are_those_of_files(
    faults: Source, truth: list[tuple[object, ...]], tmp_path: Path, kind: str, workers: int, gigabytes: float
) -> None:
    steps = STEPS if gigabytes else 8  # without a cache each sample is a request
    with stream(faults, f"{faults.root}/{kind}", tmp_path / "cache", gigabytes, workers) as remote:
        assert [told(next(remote)) for _ in range(steps)] == truth[:steps]
    if gigabytes == 0 and kind == "indexed":
        assert len(faults.proxy.faults) >= 3


def test_faults_while_units_are_fetched(
    faults: Source, truth: list[tuple[object, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults.proxy.rate = 0.4
    with stream(faults, f"{faults.root}/indexed", tmp_path / "cache", workers=2) as remote:
        assert [told(next(remote)) for _ in range(STEPS)] == truth
    assert sum(faults.proxy.faults.values()) >= 5


def test_a_store_that_stays_away_stops_the_run_in_words(
    faults: Source, truth: list[tuple[object, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DROMOS_READ_TRIES", "3")
    faults.proxy.rate = 0.0
    with stream(faults, f"{faults.root}/indexed", tmp_path / "cache", 0.0) as remote:
        assert told(next(remote)) == truth[0]
        faults.proxy.rate, faults.proxy.kinds = 1.0, ("503",)
        with pytest.raises(
            ReadError,
            match=r"source 'a': s3://.*/0000\d\.tar, sample \d+: .*after 3 tries: 503 SlowDown.*replaced",
        ):
            list(remote)


def test_a_shard_that_was_changed_stops_the_run_in_words(source: Source, tmp_path: Path) -> None:
    root = f"{source.root}/changing"
    for path in sorted(source.folder.rglob("*")):
        if path.is_file():
            storage.publish(f"{root}/{path.relative_to(source.folder)}", path.read_bytes())
    with stream(source, root, tmp_path / "cache", 0.0) as remote:
        next(remote)
        for shard, count in enumerate(COUNTS):
            if count > 1:
                storage.publish(f"{root}/{shard:05d}.tar", bytes(10_000_000))
        with pytest.raises(UserError, match=r"\.tar was changed: it has 10000000 bytes now, \d+ before"):
            list(remote)


CHILD = """
    import sys
    from pathlib import Path
    from tests.fault.test_s3_faults import *
    source = Source(Path(sys.argv[1]), sys.argv[2], None)
    with stream(source, sys.argv[2] + "/indexed", Path(sys.argv[3]), workers=2) as remote:
        for step in range(int(sys.argv[4])):
            told(next(remote))
            pids = [*remote._loader.worker_pids, remote._loader._prefetcher.pid]
            print(*pids, flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("steps", [1, 4])
def test_a_rank_that_is_killed_leaves_nothing_wrong_behind(
    faults: Source, truth: list[tuple[object, ...]], tmp_path: Path, steps: int
) -> None:
    cache = tmp_path / "cache"
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(CHILD),
        str(faults.folder),
        faults.root,
        str(cache),
        str(steps),
    ]
    rank = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    assert rank.stdout is not None
    assert rank.stdin is not None
    lines = [rank.stdout.readline() for _ in range(steps)]
    rank.kill()
    rank.wait()
    rank.stdout.close()
    rank.stdin.close()
    for pid in map(int, lines[-1].split()):
        wait_for_end(pid)
    with stream(faults, f"{faults.root}/indexed", cache, workers=1) as remote:
        assert [told(next(remote)) for _ in range(STEPS)] == truth


def wait_for_end(pid: int) -> None:
    """Of a process that is no child: it ends with the rank."""
    for _ in range(500):
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} outlives its rank")


def test_workers_that_are_killed_while_they_fetch_change_nothing(
    faults: Source, truth: list[tuple[object, ...]], tmp_path: Path
) -> None:
    found = []
    with stream(faults, f"{faults.root}/indexed", tmp_path / "cache", workers=2) as remote:
        for step in range(STEPS):
            if step in (1, 5, 9):
                os.kill(remote._loader.worker_pids[0], signal.SIGKILL)
            found.append(told(next(remote)))
    assert found == truth
