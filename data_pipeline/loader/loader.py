"""A rank's micro-batches in order, built ahead of time: `LocalLoader` on this machine, `RayLoader` on a Ray cluster.

Only LocalLoader starts a prefetcher for remote sources.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import Batch, StreamSpec
from data_pipeline.batches.work_items import (
    BuilderSetup,
    WorkItem,
    items_of,
    join_batches,
)
from data_pipeline.errors import UserError
from data_pipeline.loader.prefetcher import Prefetcher
from data_pipeline.storage.cache import CacheSettings
from data_pipeline.workers.pool import Pool
from data_pipeline.workers.process_pool import ProcessPool
from data_pipeline.workers.ray_pool import RayPool
from data_pipeline.workers.thread_pool import ThreadPool
from data_pipeline.workers.watchdog import StallLimits

# Maximum bytes submitted ahead of the current step; a single item may exceed it.
AHEAD_BYTES = 1 << 30
# Slices per worker among all submitted items: two in the worker and two in the queue.
SLICES_AHEAD_PER_WORKER = 4


class Loader:
    """Base of the local and the Ray loader. The batches of a step do not depend on the backend, nor on earlier steps.

    The constructor reads up to 8 samples of every source, until one is usable, so that a source without images is a
    UserError before training.

    builders: stream name -> BatchBuilder; they count as checked, and no sample is read. By default new ones are made
        and checked
    cache: the node cache for remote sources; builders that are passed in keep their own
    dummy_rows: fill up the batches of ranks with fewer rows, so that all ranks have micro-batches of the same sizes
    wait_seconds: seconds that the caller waited for the last step
    """

    def __init__(
        self,
        specs: Sequence[StreamSpec],
        rank: int,
        world_size: int,
        workers: int,
        micro_batch: int | None = None,
        builders: Mapping[str, BatchBuilder] | None = None,
        limits: StallLimits | None = None,
        cache: CacheSettings | None = None,
        dummy_rows: bool = True,
    ) -> None:
        if workers < 0:
            raise UserError(
                f"loader.workers (in Python: workers) is {workers}; set 0 for a thread, or more for processes"
            )
        self.specs = list(specs)
        self.rank = rank
        self.world_size = world_size
        self.workers = workers
        self.micro_batch = micro_batch
        self.dummy_rows = dummy_rows
        self.wait_seconds = 0.0
        self._iteration = 0
        self.limits = limits or StallLimits()
        self.builders = dict(builders or {spec.name: BatchBuilder(spec, cache=cache) for spec in self.specs})
        self._prefetcher: Prefetcher | None = None
        self._pool: Pool = self._open_pool()
        if builders is None:
            self._check_sources()  # workers start meanwhile

    def _open_pool(self) -> Pool:
        raise NotImplementedError

    @property
    def setups(self) -> list[BuilderSetup]:
        return [BuilderSetup.of(builder) for builder in self.builders.values()]

    def steps(self, first: int, last: int) -> Iterator[dict[str, list[Batch]]]:
        """Yield steps first, ..., last - 1 (from 0, as range): stream name -> this rank's micro-batches.

        Only the newest iterator of a loader works; an older one raises RuntimeError. Raises the errors of building.
        """
        self._iteration += 1
        iteration = self._iteration
        self._pool.cancel()  # the items of an earlier iterator
        items = self._items(first, last)
        next_item = next(items, None)
        submitted: deque[tuple[WorkItem, int | None]] = deque()
        submitted_bytes = 0
        if self._prefetcher is not None:
            self._prefetcher.begin(first, last)

        def submit(step: int) -> None:
            nonlocal next_item, submitted_bytes
            while next_item is not None and self._may_submit(next_item[0], step, submitted_bytes):
                item, slices = next_item
                is_empty = item.start == item.stop
                submitted.append((item, None if is_empty else self._pool.submit(item, slices)))
                submitted_bytes += self._bytes(next_item[0])
                next_item = next(items, None)

        try:
            for step in range(first, last):
                if iteration != self._iteration:
                    raise RuntimeError("another iterator over this loader's steps has started; use that one")
                start = time.perf_counter()
                if self._prefetcher is not None:
                    self._prefetcher.advance(step)
                submit(step)
                batches: dict[str, list[Batch]] = {spec.name: [] for spec in self.specs}
                while submitted and submitted[0][0].step == step:
                    item, ticket = submitted.popleft()
                    batches[item.stream].append(self._batch(item, ticket))
                    submitted_bytes -= self._bytes(item)
                submit(step)
                self.wait_seconds = time.perf_counter() - start
                yield batches
        finally:
            if iteration == self._iteration:
                self._pool.cancel()

    def _batch(self, item: WorkItem, ticket: int | None) -> Batch:
        """The batch of an item with its dummy rows; without a ticket it has no other rows."""
        rows = [self._pool.result(ticket)] if ticket is not None else []
        if item.dummies or not rows:
            rows.append(self.builders[item.stream].dummy_rows(item.step, item.stop, item.dummies))
        return join_batches(rows)

    def _items(self, first: int, last: int) -> Iterator[tuple[WorkItem, int]]:
        """This rank's items in order, each with the number of slices that keeps all workers busy.

        Every item of the first step is split over all workers, for a fast start. Later, all submitted items together
        have SLICES_AHEAD_PER_WORKER slices per worker.
        """
        for step in range(first, last):
            items = list(
                items_of(self.specs, step, self.rank, self.world_size, self.micro_batch, self.dummy_rows)
            )
            ahead = len(items) * (self._pool.ahead + 1)
            slices = self.workers if step == first else -(-SLICES_AHEAD_PER_WORKER * self.workers // ahead)
            for item in items:
                yield item, max(1, slices)

    def _may_submit(self, item: WorkItem, step: int, submitted_bytes: int) -> bool:
        """True if an item may be submitted during `step`, with `submitted_bytes` submitted and not yet served."""
        if item.step == step:
            return True
        return item.step <= step + self._pool.ahead and (
            not submitted_bytes or submitted_bytes + self._bytes(item) <= AHEAD_BYTES
        )

    def _bytes(self, item: WorkItem) -> int:
        rows = item.stop - item.start + item.dummies
        return rows * sum(array.bytes for array in self.builders[item.stream].spec.arrays.values())

    def _check_sources(self) -> None:
        try:
            for builder in self.builders.values():
                builder.check()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the workers and close all files. The loader cannot be used afterwards."""
        self._pool.close()
        if self._prefetcher is not None:
            self._prefetcher.close()
        for builder in self.builders.values():
            builder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LocalLoader(Loader):
    """Builds batches on this machine: in `workers` processes two steps ahead, or with 0 in a thread one step ahead.

    It starts a prefetcher if a source is remote and has an index.
    """

    def _open_pool(self) -> Pool:
        self._prefetcher = Prefetcher.start_if_useful(self.setups, self.rank, self.world_size)
        if self.workers:
            return ProcessPool(self.setups, self.workers, self.limits)
        return ThreadPool(self.builders, self.limits)

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the running workers."""
        return self._pool.pids if isinstance(self._pool, ProcessPool) else []


class RayLoader(Loader):
    """Builds the same batches as LocalLoader, bit for bit, in `workers` actors per rank on the cluster at RAY_ADDRESS.

    Every node needs dromos and access to the shards; manifests and tokenizer are sent to the actors. There is no
    prefetcher: an actor downloads a range into its node's cache when it first needs it.
    """

    def _open_pool(self) -> Pool:
        return RayPool(self.setups, self.workers, self.rank * max(1, self.workers), self.limits)

    @property
    def actor_locations(self) -> list[tuple[str, int]]:
        """(node id, process id) of every actor."""
        assert isinstance(self._pool, RayPool)
        return self._pool.locations()
