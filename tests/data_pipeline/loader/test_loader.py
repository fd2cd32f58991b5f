"""The loader: same steps for any ranks and workers, dead and failing workers, and no processes left behind."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import SourceSpec, UserError, activity
from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import Batch, StreamSpec
from data_pipeline.batches.work_items import WorkItem, micro_batches
from data_pipeline.errors import ReadError, WorkerError
from data_pipeline.loader import loader as loader_module
from data_pipeline.loader.loader import Loader, LocalLoader
from data_pipeline.transforms.text_formats import PackedFormat
from data_pipeline.workers import process_pool, thread_pool
from data_pipeline.workers.pool import Pool
from data_pipeline.workers.process_pool import ProcessPool
from data_pipeline.workers.watchdog import StallLimits
from data_pipeline.workers.worker_handle import WorkerProcess
from tests.support.samples import LENGTH, SIZE, pairs, write_packed, write_source

STEPS = 6


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> list[StreamSpec]:
    """A stream of pairs and one of text, with batches that 1, 2 and 4 ranks share."""
    root = tmp_path_factory.mktemp("loader")
    packed = write_packed(root / "packed", [9, 6])
    return [
        pairs(
            root,
            batch=8,
            first=write_source(root / "first", [5, 9]),
            second=write_source(root / "second", [4]),
        ),
        StreamSpec("text", 4, {"t": SourceSpec(str(packed))}, batch=4, text=PackedFormat(LENGTH)),
    ]


@pytest.fixture(scope="module")
def truth(specs: list[StreamSpec]) -> list[dict[str, Batch]]:
    """Whole global batches, one builder call each."""
    builders = {spec.name: BatchBuilder(spec) for spec in specs}
    return [
        {name: builder.make(step, 0, builder.spec.batch) for name, builder in builders.items()}
        for step in range(STEPS)
    ]


def check(steps: list[list[dict[str, list[Batch]]]], truth: list[dict[str, Batch]]) -> None:
    """`steps` by rank, then step, against the whole batches."""
    for number, want in enumerate(truth):
        for name, whole in want.items():
            parts = [batch for rank in steps for batch in rank[number][name]]
            assert parts[0].start == 0
            assert all(a.stop == b.start for a, b in pairwise(parts))
            assert all(part.step == number for part in parts)
            for field in (
                "tokens",
                "used",
                "row_keys",
                "sample_ids",
                *(["pixels"] if name == "pairs" else []),
            ):
                found = np.concatenate([getattr(part, field) for part in parts])
                np.testing.assert_array_equal(found, getattr(whole, field))
            for field in ("batch_digest", "order_digest"):
                assert sum(getattr(part, field) for part in parts) % 2**64 == getattr(whole, field)


@pytest.mark.parametrize(
    ("world_size", "workers", "micro_batch"),
    [(1, 0, None), (1, 1, None), (1, 2, 3), (2, 0, 1), (2, 2, None), (4, 0, 2), (4, 1, 100)],
)
def test_ranks_workers_and_micro_batches_do_not_change_a_step(
    specs: list[StreamSpec],
    truth: list[dict[str, Batch]],
    world_size: int,
    workers: int,
    micro_batch: int | None,
) -> None:
    steps = []
    for rank in range(world_size):
        with LocalLoader(specs, rank, world_size, workers, micro_batch) as loader:
            steps.append(list(loader.steps(0, STEPS)))
    check(steps, truth)


def test_a_resumed_loader_goes_on(specs: list[StreamSpec], truth: list[dict[str, Batch]]) -> None:
    with LocalLoader(specs, 0, 1, 2) as loader:
        for _ in loader.steps(0, STEPS):
            break
        assert [step["text"][0].step for step in loader.steps(4, STEPS)] == [4, 5]
        check([list(loader.steps(0, STEPS))], truth)
    assert loader.wait_seconds > 0


@pytest.mark.parametrize("workers", [0, 1])
def test_an_older_iterator_leaves_the_newer_one_alone(
    specs: list[StreamSpec], truth: list[dict[str, Batch]], workers: int
) -> None:
    with LocalLoader(specs, 0, 1, workers) as loader:
        older, ended = loader.steps(0, STEPS), loader.steps(0, STEPS)
        next(older)
        next(ended)
        newer = loader.steps(1, STEPS)
        next(newer)
        del ended
        with pytest.raises(RuntimeError, match="another iterator over this loader's steps has started"):
            next(older)
        (batch,) = next(newer)["pairs"]
    assert batch.batch_digest == truth[2]["pairs"].batch_digest


def test_a_killed_worker_is_replaced_and_nothing_is_lost(
    specs: list[StreamSpec], truth: list[dict[str, Batch]]
) -> None:
    with LocalLoader(specs, 0, 1, 2, micro_batch=2) as loader:
        killed = set()
        steps = []
        for number, step in enumerate(loader.steps(0, STEPS)):
            steps.append(step)
            if number in (0, 2, 3):
                for pid in loader.worker_pids[: 1 + number % 2]:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
        check([steps], truth)
        assert len(killed) >= 2
        # A killed worker is listed until the pool's thread reads the end of its socket.
        wait_until(lambda: len(loader.worker_pids) == 2 and not killed & set(loader.worker_pids))


def test_signals_of_the_job_do_not_end_workers(
    specs: list[StreamSpec], truth: list[dict[str, Batch]]
) -> None:
    """Ctrl-C and Slurm's warning reach every process; the rank must still get its batches to save at a boundary."""
    with LocalLoader(specs, 0, 1, 1) as loader:
        wait_until(lambda: len(loader.worker_pids) == 1)
        pids = loader.worker_pids
        steps = []
        for step in loader.steps(0, STEPS):
            steps.append(step)
            for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                os.kill(pids[0], name)
        check([steps], truth)
        assert loader.worker_pids == pids


def test_a_signal_while_a_worker_starts_does_not_end_it(specs: list[StreamSpec]) -> None:
    with LocalLoader(specs, 0, 1, 1) as loader:
        wait_until(lambda: len(loader.worker_pids) == 1)
        pids = loader.worker_pids
        for _ in range(40):
            os.kill(pids[0], signal.SIGINT)
            time.sleep(0.01)
        next(loader.steps(0, 1))
        assert loader.worker_pids == pids


def test_workers_import_no_torch(specs: list[StreamSpec]) -> None:
    import torch  # noqa: F401  # the parent has it, as a trainer does

    with LocalLoader(specs, 0, 1, 1) as loader:
        next(loader.steps(0, 1))
        maps = Path(f"/proc/{loader.worker_pids[0]}/maps").read_text()
    assert "multiarray" in maps
    assert "libtorch" not in maps


def test_a_users_mistake_in_a_worker_keeps_its_type(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a", [4, 4])
    (source / "00001_stats.json").write_text(json.dumps({"successes": 5}))
    with LocalLoader([pairs(tmp_path, batch=9, a=source)], 0, 1, 1) as loader:
        with pytest.raises(UserError, match=r"00001\.tar holds 4 samples, but .* 5") as error:
            list(loader.steps(0, 2))
        assert "in a loader worker" in error.value.__notes__[0]


def test_an_error_comes_at_its_step_and_not_before(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a", [4])
    spec = pairs(tmp_path, batch=2, a=SourceSpec(str(source), max_epochs=1))
    for workers in (0, 1):
        with LocalLoader([spec], 0, 1, workers) as loader:
            steps = loader.steps(0, 9)
            assert [next(steps)["pairs"][0].step for _ in range(2)] == [0, 1]
            with pytest.raises(UserError, match="the stream has ended"):
                next(steps)


def test_workers_that_cannot_start_are_an_error(
    specs: list[StreamSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with LocalLoader(specs, 0, 1, 2) as loader, pytest.raises(WorkerError, match="exit code 1"):
        next(loader.steps(0, 1))


def test_a_system_that_starts_no_worker_is_an_error_after_which_a_rank_can_save(
    specs: list[StreamSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> WorkerProcess:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(process_pool, "WorkerProcess", full)
    with (
        LocalLoader(specs, 0, 1, 2) as loader,
        pytest.raises(WorkerError, match=r"cannot start loader workers .*Too many open files"),
    ):
        next(loader.steps(0, 1))


def test_workers_whose_start_stalls_are_named(
    specs: list[StreamSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with (
        caplog.at_level(logging.WARNING, "dromos.loader"),
        LocalLoader(specs, 0, 1, 1, limits=StallLimits(0.1, 0.5)) as loader,
        pytest.raises(
            ReadError,
            match=r"two workers, one after the other, stalled: reading its program files and the source indexes",
        ),
    ):
        next(loader.steps(0, 1))
    assert any("has been reading its program files" in record.getMessage() for record in caplog.records)


def test_look_ahead_is_bounded(specs: list[StreamSpec]) -> None:
    asked: list[WorkItem] = []

    class Recording(thread_pool.ThreadPool):
        ahead = 2

        def submit(self, item: WorkItem, pieces: int = 1) -> int:
            asked.append(item)
            return super().submit(item, pieces)

    class Recorded(Loader):
        def _open_pool(self) -> Pool:
            return Recording(self.builders)

    with Recorded(specs, 0, 1, 0) as loader:
        for number, _ in enumerate(loader.steps(0, 9)):
            assert max(item.step for item in asked) == min(number + 2, 8)
    assert asked == [WorkItem(s.name, step, 0, s.batch) for step in range(9) for s in specs]
    assert (thread_pool.ThreadPool.ahead, ProcessPool.ahead) == (1, 2)


class Counting:
    """A pool that makes nothing and counts the bytes of pixels that are asked for and not handed out."""

    ahead = 2

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.pieces: list[int] = []
        self.most = 0

    def submit(self, item: WorkItem, pieces: int = 1) -> int:
        ticket = len(self.pieces)
        self.pieces.append(pieces)
        self.held[ticket] = (item.stop - item.start) * SIZE * SIZE * 3
        self.most = max(self.most, sum(self.held.values()))
        return ticket

    def result(self, ticket: int) -> Batch:
        self.held.pop(ticket)
        return None  # type: ignore[return-value]

    def cancel(self) -> None:
        self.held.clear()

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("rows_ahead", "asked"), [(3, 8), (8, 8), (12, 12), (1000, 24)])
def test_look_ahead_is_bounded_in_bytes(
    specs: list[StreamSpec], monkeypatch: pytest.MonkeyPatch, rows_ahead: int, asked: int
) -> None:
    """Batches of 8 rows in items of 4: a step is asked for whatever its size, and one item of the next."""
    counting = Counting()

    class Counted(Loader):
        def _open_pool(self) -> Pool:
            return counting

    monkeypatch.setattr(loader_module, "AHEAD_BYTES", rows_ahead * (SIZE * SIZE * 3 + 4 * LENGTH + 4))
    with Counted(specs[:1], 0, 1, 3, micro_batch=4) as loader:
        for _ in loader.steps(0, 9):
            ahead = sum(counting.held.values())
            assert ahead >= 4 * SIZE * SIZE * 3 or len(counting.pieces) == 18
            assert ahead <= max(4, min(16, rows_ahead // 4 * 4)) * SIZE * SIZE * 3
    assert counting.most == asked * SIZE * SIZE * 3
    # Three workers share the first step's items; after it, six items ahead make twelve pieces, four for each.
    assert counting.pieces == [3, 3] + [2] * 16


def test_the_first_batch_is_made_by_all_workers(
    specs: list[StreamSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    builders = set()
    receive = WorkerProcess.receive

    def seen(self: WorkerProcess) -> tuple[int, object]:
        found = receive(self)
        if isinstance(found[1], Batch):
            builders.add((self.pid, found[1].start, found[1].stop))
        return found

    monkeypatch.setattr(WorkerProcess, "receive", seen)
    big = dataclasses.replace(specs[0], batch=64)
    with LocalLoader([big], 0, 1, 4) as loader:
        (batch,) = next(loader.steps(0, 1))["pairs"]
    assert sorted(rows for _, *rows in builders) == [[0, 16], [16, 32], [32, 48], [48, 64]]
    assert (batch.start, batch.stop) == (0, 64)
    assert batch.batch_digest == BatchBuilder(big).make(0, 0, 64).batch_digest


def test_a_read_that_stalls_in_this_process_is_named(
    specs: list[StreamSpec], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make = BatchBuilder.make

    def slow(self: BatchBuilder, step: int, start: int, stop: int) -> Batch:
        with activity.reading("/far/away.tar"):
            time.sleep(0.5)
        return make(self, step, start, stop)

    monkeypatch.setattr(BatchBuilder, "make", slow)
    with (
        caplog.at_level(logging.WARNING, "dromos.loader"),
        LocalLoader(specs[:1], 0, 1, 0, limits=StallLimits(0.05, 0.1)) as loader,
    ):
        assert len(list(loader.steps(0, 1))) == 1
    said = [record.getMessage() for record in caplog.records]
    assert len(said) in (2, 3, 4)  # after 0.05 s, 0.1 s, 0.2 s, 0.4 s
    assert all("the loader has been reading /far/away.tar for" in line for line in said)


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 30, pause: float = 0.02) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not come true in time"
        time.sleep(pause)


def test_close_leaves_no_process(specs: list[StreamSpec]) -> None:
    loader = LocalLoader(specs, 0, 1, 2)
    next(loader.steps(0, 9))
    pids = loader.worker_pids
    assert len(pids) == 2
    loader.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    with pytest.raises(RuntimeError, match="the loader is closed"):
        next(loader.steps(0, 1))


def open_shards() -> Counter[str]:
    """Names of the folders of the tars that this process has open, once per open file."""
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return Counter(Path(link).parent.name for link in links if link.endswith(".tar"))


def test_close_leaves_no_shard_of_any_stream_open(specs: list[StreamSpec]) -> None:
    before = open_shards()
    loader = LocalLoader(specs, 0, 1, 0)
    next(loader.steps(0, 1))
    assert (open_shards() - before).keys() >= {"first", "packed"}
    loader.close()
    assert open_shards() == before


SCRIPT = f"""
import json, sys, time
from data_pipeline.loader.loader import LocalLoader
from data_pipeline.batches.spec import SourceSpec, StreamSpec
from data_pipeline.transforms.text_formats import PackedFormat
sources = {{"t": SourceSpec(sys.argv[1])}}
loader = LocalLoader([StreamSpec("text", 4, sources, batch=4, text=PackedFormat({LENGTH}))], 0, 1, 2)
next(loader.steps(0, 5))
print(json.dumps(loader.worker_pids), flush=True)
if sys.argv[2] == "stay":
    time.sleep(60)
"""


@pytest.mark.parametrize("way", ["stay", "leave"])
def test_workers_end_with_their_parent(tmp_path: Path, way: str) -> None:
    """A kill -9 of the rank, or its normal end without close()."""
    source = write_packed(tmp_path / "packed", [6])
    script = tmp_path / "rank.py"
    script.write_text(SCRIPT)
    with subprocess.Popen([sys.executable, str(script), str(source), way], stdout=subprocess.PIPE) as rank:
        assert rank.stdout is not None
        pids = json.loads(rank.stdout.readline())
        if way == "stay":
            assert all(alive(pid) for pid in pids)
            rank.kill()
        rank.wait(20)
        wait_until(lambda: not any(alive(pid) for pid in pids), 10)


def test_micro_batches() -> None:
    assert micro_batches(4, 11, 3) == [(4, 7), (7, 10), (10, 11)]
    assert micro_batches(4, 11, None) == micro_batches(4, 11, 100) == [(4, 11)]
    assert micro_batches(4, 4, None) == micro_batches(4, 4, 3) == [(4, 4)]  # not nothing: every rank has one


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, data_pipeline; sys.exit(any(m in sys.modules for m in ('numpy', 'torch', 'pyarrow')))"
    subprocess.run([sys.executable, "-c", code], check=True)
