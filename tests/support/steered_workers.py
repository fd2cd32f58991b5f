"""A process pool whose workers a test steers: it writes their pixels and answers, and lets them stall or die."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from data_pipeline.activity import Activity
from data_pipeline.batches.spec import Batch, SourceSpec, StreamSpec
from data_pipeline.batches.work_items import BuilderSetup, WorkItem
from data_pipeline.transforms.decode import ImageSpec
from data_pipeline.workers import isolation, process_pool
from data_pipeline.workers.process_pool import ProcessPool
from data_pipeline.workers.watchdog import StallLimits
from data_pipeline.workers.worker import READY, WorkMessage

SPEC = StreamSpec("pairs", 0, {"a": SourceSpec("nowhere")}, batch=64, image=ImageSpec(4))
ROW_BYTES = 4 * 4 * 3


def pixels_of(step: int, start: int, stop: int) -> np.ndarray:
    """The right pixels of rows: each row has a value of its own."""
    values = (step * 37 + np.arange(start, stop)) % 251
    return np.repeat(values, ROW_BYTES).astype(np.uint8).reshape(-1, 4, 4, 3)


def batch_of(item: WorkItem, pixels: np.ndarray | None) -> Batch:
    rows = item.stop - item.start
    numbers = np.arange(item.start, item.stop)
    keys = (item.step * 1000 + numbers).astype(np.uint64)
    return Batch(
        "pairs", item.step, item.start, item.stop, {} if pixels is None else {"pixels": pixels[:, None]},
        np.ones(rows, np.float32), keys, keys,
    )  # fmt: skip


@dataclass(eq=False)
class Worker:
    """A worker process in name only: the test writes its pixels, its answers and its end.

    pending: works that it has and has not answered, in order; events: what happened to all workers, in order
    """

    crew: Crew
    number: int
    pending: list[tuple[WorkMessage, Any]] = field(default_factory=list)
    answers: list[tuple[int, Any]] = field(default_factory=list)
    activity: Activity = field(default_factory=Activity)
    is_dead: bool = False

    def __post_init__(self) -> None:
        self._ours, self._test = socket.socketpair()
        self.pid = 10**7 + self.number
        self._tell((READY, None))

    def fileno(self) -> int:
        return self._ours.fileno()

    def send(self, work: WorkMessage, buffer: Any = None, alive: Any = None) -> None:
        with self.crew.changed:
            self.pending.append((work, buffer))
            self.crew.note(f"send {self.number}", work)

    def receive(self) -> tuple[int, Any]:
        self._ours.recv(1)
        with self.crew.changed:
            if not self.answers:
                raise EOFError
            answer = self.answers.pop(0)
            self.pending = [each for each in self.pending if each[0].number != answer[0]]
            self.crew.changed.notify_all()
            return answer

    def inspect(self) -> Activity:
        return self.activity

    def kill(self) -> int:
        with self.crew.changed:
            self.is_dead, self.pending = True, []
            self.crew.note(f"kill {self.number}", None)
            self.crew.workers.remove(self)
        self._ours.close()
        self._test.close()
        return -9

    def scribble(self, value: int) -> None:
        """Write to the pixels of the current work, as a worker does before it answers."""
        work, buffer = self.pending[0]
        if buffer is not None:
            self._region(work, buffer)[:] = value

    def answer(self) -> WorkItem:
        """Build the current work and answer it."""
        work, buffer = self.pending[0]
        right: np.ndarray | None = pixels_of(work.item.step, work.item.start, work.item.stop)
        if buffer is not None:
            assert right is not None
            self._region(work, buffer)[:] = right.reshape(-1)
            right = None
        self._tell((work.number, batch_of(work.item, right)))
        return work.item

    def die(self) -> None:
        """End, as after a kill -9 by the kernel."""
        self._test.send(b"!")

    def _tell(self, answer: tuple[int, Any]) -> None:
        with self.crew.changed:
            self.answers.append(answer)
        self._test.send(b"!")

    @staticmethod
    def _region(work: WorkMessage, buffer: Any) -> np.ndarray:
        size = (work.item.stop - work.item.start) * ROW_BYTES
        return buffer.array(work.offset + size)[work.offset :]


@dataclass(eq=False)
class Crew:
    """All workers of a pool, living ones in `workers`."""

    workers: list[Worker] = field(default_factory=list)
    events: list[tuple[str, WorkMessage | None]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    started: int = 0

    def hire(self, *_: object) -> Worker:
        with self.changed:
            self.started += 1
            worker = Worker(self, self.started)
            self.workers.append(worker)
            self.changed.notify_all()
        return worker

    def note(self, event: str, work: WorkMessage | None) -> None:
        self.events.append((event, work))
        self.changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, 30), "the pool did not get there"

    def have(self, works: int) -> None:
        """Wait until the workers have this many unanswered works, and every answer was read."""
        self.wait(
            lambda: (
                sum(len(worker.pending) for worker in self.workers) == works
                and not any(worker.answers for worker in self.workers)
            )
        )


@contextmanager
def pool_of(workers: int, limits: StallLimits | None = None) -> Iterator[tuple[ProcessPool, Crew]]:
    crew = Crew()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_pool, "WorkerProcess", crew.hire)
        patch.setattr(isolation, "WorkerProcess", crew.hire)
        pool = ProcessPool([BuilderSetup(SPEC, {}, None)], workers, limits)
        try:
            crew.wait(lambda: len(crew.workers) == workers)
            crew.have(0)
            yield pool, crew
        finally:
            pool.close()


def item(step: int, rows: int = 16, start: int = 0) -> WorkItem:
    return WorkItem("pairs", step, start, start + rows)


def buffer_of(crew: Crew, step: int) -> int | None:
    """Number of the buffer that the workers got for a step."""
    numbers = {work.buffer for event, work in crew.events if work is not None and work.item.step == step}
    (number,) = numbers
    return number
