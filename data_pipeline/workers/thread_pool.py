"""Where items of work are done: in a thread of this process here, in worker processes in process_pool.py."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Protocol

from data_pipeline import activity
from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import Batch
from data_pipeline.batches.work_items import BuilderSetup, WorkItem
from data_pipeline.workers.isolation import LOOK, place
from data_pipeline.workers.watchdog import StallLimits, StallWatch


class Pool(Protocol):
    """Takes items, gives batches; `ahead` is how many steps it is worth asking for in advance."""

    ahead: int

    def submit(self, item: WorkItem, pieces: int = 1) -> int:
        """A ticket for the item's batch, whose rows may be made in so many pieces at once."""
        ...

    def result(self, ticket: int) -> Batch:
        """Wait for a batch, or raise the error that its making raised."""
        ...

    def cancel(self) -> None:
        """Forget all tickets."""
        ...

    def close(self) -> None:
        """Cancel and leave nothing running."""
        ...


class ThreadPool:
    """Makes batches inside this process, one step ahead.

    Nothing protects this process here: a decoder that crashes ends it, and a read that stalls is named in the log but
    cannot be ended.
    """

    ahead = 1

    def __init__(self, builders: Mapping[str, BatchBuilder], limits: StallLimits | None = None) -> None:
        self._makers = builders
        self._limits = limits or StallLimits()
        self._thread = ThreadPoolExecutor(1, "dromos-loader")
        self._futures: dict[int, Future[Batch]] = {}
        self._next = 0
        self._status = activity.own()
        setups = [BuilderSetup.of(builder) for builder in builders.values()]
        self._watch = StallWatch(self._limits, "the loader", lambda sample: place(setups, sample))

    def submit(self, item: WorkItem, pieces: int = 1) -> int:
        ticket, self._next = self._next, self._next + 1
        builder = self._makers[item.stream]
        self._futures[ticket] = self._thread.submit(builder.make, item.step, item.start, item.stop)
        return ticket

    def result(self, ticket: int) -> Batch:
        future = self._futures.pop(ticket)
        while not wait_for([future], min(LOOK, self._limits.warn)).done:
            self._watch.see(activity.read_status(self._status))
        return future.result()

    def cancel(self) -> None:
        for future in self._futures.values():
            future.cancel()
        self._futures.clear()

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
