"""Shared buffers for pixels: not written while an array uses them, reused afterwards, and freed with the process."""

from __future__ import annotations

import gc
import json
import os
import pickle
import random
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import StreamSpec
from data_pipeline.batches.work_items import WorkItem, join_batches, split_item
from data_pipeline.loader.loader import LocalLoader
from data_pipeline.transforms.text_formats import PackedFormat
from data_pipeline.workers import ipc, shared_memory
from data_pipeline.workers.process_pool import ProcessPool
from data_pipeline.workers.shared_memory import SharedBufferPool
from tests.data_pipeline.loader.test_loader import wait_until
from tests.support.samples import SIZE, pairs, write_packed, write_source

BATCH = 24


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> StreamSpec:
    root = tmp_path_factory.mktemp("buffers")
    bad = {(0, i): {"png": b"broken", "txt": b"a"} for i in (1, 4)}
    return pairs(root, batch=BATCH, web=write_source(root / "web", [30, 21], bad))


def buffer_count(loader: LocalLoader) -> int:
    assert isinstance(loader._pool, ProcessPool)
    return loader._pool.buffer_count


VIEWS: list[Callable[[np.ndarray], Any]] = [
    lambda pixels: pixels,
    lambda pixels: pixels[3:5, ::2],
    lambda pixels: pixels.transpose(0, 3, 1, 2)[-1:],
    lambda pixels: torch.from_numpy(pixels),
    lambda pixels: torch.from_numpy(pixels).permute(0, 3, 1, 2)[1:2].view(torch.uint8),
    lambda pixels: torch.from_dlpack(pixels),
    lambda pixels: memoryview(pixels),
    lambda pixels: memoryview(pixels)[2:4],
    lambda pixels: np.frombuffer(pixels.data, np.uint8),
    lambda pixels: pixels.base,
    lambda pixels: pixels.reshape(-1).view(np.uint32),
    lambda pixels: pixels.view(np.ndarray)[0].T,
    lambda pixels: np.lib.stride_tricks.as_strided(pixels, (4,), (1,)),
]


def content(view: Any) -> bytes:
    return np.ascontiguousarray(np.asarray(view)).tobytes()


def test_pixels_in_use_are_never_overwritten(spec: StreamSpec) -> None:
    """Random views of batches, kept for random times, never change; batches equal those of a builder."""
    generator = random.Random(1)
    builder = BatchBuilder(spec)
    kept: deque[tuple[Any, bytes]] = deque()
    numbers = set()
    with LocalLoader([spec], 0, 1, 2, micro_batch=8) as loader:
        for number, step in enumerate(loader.steps(0, 40)):
            whole = builder.make(number, 0, BATCH)
            for batch in step["pairs"]:
                assert batch.pixels is not None
                assert whole.pixels is not None
                np.testing.assert_array_equal(batch.pixels, whole.pixels[batch.start : batch.stop])
                if generator.random() < 0.7:
                    view = generator.choice(VIEWS)(batch.pixels)
                    kept.append((view, content(view)))
                numbers.add(batch.pixels.__array_interface__["data"][0])
            del batch, step
            for _ in range(generator.randrange(4) if number < 26 else 6):
                if kept:
                    kept.rotate(generator.randrange(len(kept)))
                    kept.popleft()
            for view, shown in kept:
                assert content(view) == shown
            view = None
        assert len(numbers) < 80  # of 120: memory was reused
    for view, shown in kept:  # the workers and the files are gone, the pixels are not
        assert content(view) == shown


def test_memory_is_used_again_and_stays_flat(spec: StreamSpec) -> None:
    counts = []
    with LocalLoader([spec], 0, 1, 2, micro_batch=8) as loader:
        for step in loader.steps(0, 90):
            assert len(step["pairs"]) == 3
            counts.append(buffer_count(loader))
        # Three micro-batches each: in use, and of the two steps ahead; in use while the next step is made: one more.
        assert max(counts[3:]) <= 12
        assert max(counts[60:]) <= max(counts[:30])


def test_a_user_who_keeps_batches_gets_more_memory_and_gives_it_back(
    spec: StreamSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "MAX_BUFFERS", 20)
    builder = BatchBuilder(spec)
    with LocalLoader([spec], 0, 1, 1) as loader:
        steps = loader.steps(0, 60)
        kept = [next(steps)["pairs"][0] for _ in range(30)]
        assert buffer_count(loader) == 20  # later batches came through the socket
        for number, batch in enumerate(kept):
            np.testing.assert_array_equal(batch.pixels, builder.make(number, 0, BATCH).pixels)
            assert batch.pixels.flags.writeable
            assert batch.pixels.flags.c_contiguous
        descriptors = len(os.listdir("/proc/self/fd"))
        del kept, batch
        for _ in range(5):
            next(steps)
        assert buffer_count(loader) <= 5
        assert len(os.listdir("/proc/self/fd")) <= descriptors - 2 * 15
        worker = loader.worker_pids[0]
        mapped = Path(f"/proc/{worker}/maps").read_text().count("memfd:dromos-batch")
        assert mapped <= 8  # of 20: the next message tells it which buffers are gone


def test_where_there_is_no_anonymous_memory_batches_come_through_the_socket(
    spec: StreamSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (ipc, shared_memory):
        monkeypatch.setattr(module, "has_anonymous_memory", lambda: False)
    builder = BatchBuilder(spec)
    with LocalLoader([spec], 0, 1, 2) as loader:
        for number, step in enumerate(loader.steps(0, 4)):
            want = builder.make(number, 0, BATCH)
            np.testing.assert_array_equal(step["pairs"][0].pixels, want.pixels)
            assert step["pairs"][0].batch_digest == want.batch_digest
        assert buffer_count(loader) == 0


def test_what_is_left_early_is_not_written_to_what_comes_next(spec: StreamSpec) -> None:
    """Workers still write to the buffers of cancelled items while the next steps are built."""
    builder = BatchBuilder(spec)
    with LocalLoader([spec], 0, 1, 2, micro_batch=6) as loader:
        for start in range(0, 40, 4):
            for number, step in enumerate(loader.steps(start, start + 9), start):
                whole = builder.make(number, 0, BATCH)
                for batch in step["pairs"]:
                    np.testing.assert_array_equal(batch.pixels, whole.pixels[batch.start : batch.stop])
                if number == start + 1:
                    break
        assert buffer_count(loader) <= 30


def test_pixels_go_through_shared_memory_and_not_through_the_socket(
    spec: StreamSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = []
    whole = ipc._receive_exactly

    def counting(socket: Any, size: int) -> memoryview:
        received.append(size)
        return whole(socket, size)

    monkeypatch.setattr(ipc, "_receive_exactly", counting)
    with LocalLoader([spec], 0, 1, 1) as loader:
        batch = next(loader.steps(0, 1))["pairs"][0]
        assert batch.pixels.nbytes == BATCH * SIZE * SIZE * 3
        assert 0 < sum(received) < 6000
    assert pickle.loads(pickle.dumps(batch)).batch_digest == batch.batch_digest


def test_slices_tile_an_item_and_join_to_the_whole(spec: StreamSpec, tmp_path: Path) -> None:
    builder = BatchBuilder(spec)
    text = StreamSpec("text", 0, {"t": spec.sources["web"]}, batch=2048, text=PackedFormat(8))
    packed = StreamSpec(
        "text",
        4,
        {"t": type(spec.sources["web"])(str(write_packed(tmp_path / "t", [9])))},
        batch=600,
        text=PackedFormat(8),
    )
    assert [len(split_item(WorkItem("text", 0, 0, 2048), text, pieces)) for pieces in (1, 3, 9)] == [1, 3, 8]
    for each, made, rows in ((spec, builder, BATCH), (packed, BatchBuilder(packed), 600)):
        for pieces in (1, 2, 3, 7):
            items = split_item(WorkItem(each.name, 3, 0, rows), each, pieces)
            assert [row for item in items for row in range(item.start, item.stop)] == list(range(rows))
            parts = [made.make(3, item.start, item.stop) for item in items]
            found, want = join_batches(parts), made.make(3, 0, rows)
            for name, value in vars(want).items():
                np.testing.assert_equal(getattr(found, name), value)
    assert builder.make(3, 0, BATCH).skipped


def test_memory_fits_what_it_is_taken_for() -> None:
    pool = SharedBufferPool()
    big = pool.acquire(100_000)
    assert big is not None
    seen = pool.hand_out(big, (10, 100))
    seen[:] = 7
    small = pool.acquire(100)
    assert small is not None
    assert small is not big
    pool.release(small)
    assert pool.acquire(80) is small
    assert seen.sum() == 7000
    del seen
    assert pool.acquire(90_000) is big
    pool.release(big)
    assert pool.acquire(20_000) is not big  # too large for it
    assert pool.acquire(0) is None
    pool.trim(0)
    assert big.number not in pool.alive
    pool.close()


def test_arrays_in_a_cycle_come_back_with_the_collector() -> None:
    pool = SharedBufferPool()
    buffer = pool.acquire(64)
    assert buffer is not None
    cycle: list[Any] = [pool.hand_out(buffer, (8, 8))]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert pool.acquire(64) is buffer
    pool.close()


SCRIPT = """
import sys, os, json, time
from data_pipeline.loader.loader import LocalLoader
import pickle
spec = pickle.load(open(sys.argv[1], "rb"))
loader = LocalLoader([spec], 0, 1, 2)
kept = [step["pairs"][0] for step in loader.steps(0, 3)]
print(json.dumps(loader.worker_pids), flush=True)
time.sleep(60)
"""


def test_a_kill_leaves_no_memory_behind(spec: StreamSpec, tmp_path: Path) -> None:
    (tmp_path / "spec").write_bytes(pickle.dumps(spec))
    (tmp_path / "rank.py").write_text(SCRIPT)
    before = set(os.listdir("/dev/shm"))
    command = [sys.executable, str(tmp_path / "rank.py"), str(tmp_path / "spec")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as rank:
        assert rank.stdout is not None
        pids = json.loads(rank.stdout.readline())
        assert "memfd:dromos-batch" in Path(f"/proc/{pids[0]}/maps").read_text()
        rank.kill()
        rank.wait(20)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 20)
    assert set(os.listdir("/dev/shm")) <= before
