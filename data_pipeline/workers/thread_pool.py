"""`ThreadPool` builds batches in one thread of the training process."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for

from data_pipeline import activity
from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import Batch
from data_pipeline.batches.work_items import BuilderSetup, WorkItem
from data_pipeline.workers.failures import POLL_SECONDS, describe_sample
from data_pipeline.workers.watchdog import StallLimits, StallWatch


class ThreadPool:
    """Builds batches inside this process, one step ahead (`loader.workers: 0`).

    This process is not protected: a decoder crash ends it, and a stalled read is logged but not interrupted.
    """

    ahead = 1

    def __init__(self, builders: Mapping[str, BatchBuilder], limits: StallLimits | None = None) -> None:
        self._builders = builders
        self._limits = limits or StallLimits()
        self._thread = ThreadPoolExecutor(1, "dromos-loader")
        self._futures: dict[int, Future[Batch]] = {}
        self._next_ticket = 0
        self._status = activity.status_memory()
        setups = [BuilderSetup.of(builder) for builder in builders.values()]
        self._watch = StallWatch(self._limits, "the loader", lambda sample: describe_sample(setups, sample))

    def submit(self, item: WorkItem, slices: int = 1) -> int:
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        builder = self._builders[item.stream]
        self._futures[ticket] = self._thread.submit(builder.make, item.step, item.start, item.stop)
        return ticket

    def result(self, ticket: int) -> Batch:
        future = self._futures.pop(ticket)
        while not wait_for([future], min(POLL_SECONDS, self._limits.warn)).done:
            self._watch.check(activity.read_status(self._status))
        return future.result()

    def cancel(self) -> None:
        for future in self._futures.values():
            future.cancel()
        self._futures.clear()

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
