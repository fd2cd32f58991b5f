"""Steps of a rank, in order, made ahead of time by local workers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from types import TracebackType
from typing import Self

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import Batch, StreamSpec
from data_pipeline.batches.work_items import (
    BuilderSetup,
    WorkItem,
    check_ranks,
    items_of,
    pixel_shape,
)
from data_pipeline.errors import UserError
from data_pipeline.loader.prefetcher import Prefetcher
from data_pipeline.storage.cache import CacheSettings
from data_pipeline.workers.process_pool import ProcessPool
from data_pipeline.workers.ray_pool import RayPool
from data_pipeline.workers.thread_pool import Pool, ThreadPool
from data_pipeline.workers.watchdog import StallLimits

# Bytes that a rank asks for ahead of the step that it serves; one item may be asked for however big it is.
AHEAD_BYTES = 1 << 30
PIECES = 4


class Loader:
    """What local and Ray loaders share. A step's batches do not depend on who makes them, nor on what came before.

    Opening it reads one sample of every source, so that a source without images ends here in a UserError.
    builders: stream -> BatchBuilder, for its order, manifests and tokenizer; those handed in are taken as checked
    cache: where what is read of an object store is kept on this node; builders that are handed in have their own
    wait_seconds: how long the caller waited for the step that was yielded last
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
    ) -> None:
        check_ranks(specs, world_size)
        if workers < 0:
            raise UserError(f"loader.workers is {workers}; write how many processes decode, or 0 for none")
        self.specs = list(specs)
        self.rank = rank
        self.world_size = world_size
        self.workers = workers
        self.micro_batch = micro_batch
        self.wait_seconds = 0.0
        self._turn = 0
        self.limits = limits or StallLimits()
        self.builders = dict(builders or {spec.name: BatchBuilder(spec, cache=cache) for spec in self.specs})
        self._prefetcher: Prefetcher | None = None
        self._pool: Pool = self._open()
        if builders is None:
            self._check()  # workers start meanwhile

    def _open(self) -> Pool:
        raise NotImplementedError

    @property
    def setups(self) -> list[BuilderSetup]:
        return [BuilderSetup.of(builder) for builder in self.builders.values()]

    def steps(self, first: int, last: int) -> Iterator[dict[str, list[Batch]]]:
        """Steps first, ..., last - 1, counted from 0, as range() does: stream -> this rank's micro-batches.

        One iterator at a time: where another has begun, the one before it raises RuntimeError.
        """
        self._turn += 1
        turn = self._turn
        self._pool.cancel()  # what an iterator before this one has asked for
        todo = self._items(first, last)
        following = next(todo, None)
        asked: deque[tuple[WorkItem, int]] = deque()
        held = 0
        if self._prefetcher is not None:
            self._prefetcher.begin(first, last)

        def ask(step: int) -> None:
            nonlocal following, held
            while following is not None and self._in_reach(following[0], step, held):
                asked.append((following[0], self._pool.submit(*following)))
                held += self._bytes(following[0])
                following = next(todo, None)

        try:
            for step in range(first, last):
                if turn != self._turn:
                    raise RuntimeError(
                        "another iterator over this loader's steps has begun; go on with that one"
                    )
                began = time.perf_counter()
                if self._prefetcher is not None:
                    self._prefetcher.at(step)
                ask(step)
                found: dict[str, list[Batch]] = {spec.name: [] for spec in self.specs}
                while asked and asked[0][0].step == step:
                    item, ticket = asked.popleft()
                    found[item.stream].append(self._pool.result(ticket))
                    held -= self._bytes(item)
                ask(step)
                self.wait_seconds = time.perf_counter() - began
                yield found
        finally:
            if turn == self._turn:
                self._pool.cancel()

    def _items(self, first: int, last: int) -> Iterator[tuple[WorkItem, int]]:
        """This rank's items in order, each with the number of pieces that keeps all workers busy.

        The first step goes to all workers at once; later, it is enough that all that is asked for has PIECES for each:
        two that it holds, and others that go to whoever is done first.
        """
        for step in range(first, last):
            items = list(items_of(self.specs, step, self.rank, self.world_size, self.micro_batch))
            ahead = len(items) * (self._pool.ahead + 1)
            pieces = self.workers if step == first else -(-PIECES * self.workers // ahead)
            for item in items:
                yield item, max(1, pieces)

    def _in_reach(self, item: WorkItem, step: int, held: int) -> bool:
        """Whether to ask for an item while `step` is served and `held` bytes are asked for or wait to be served."""
        if item.step == step:
            return True
        return item.step <= step + self._pool.ahead and (not held or held + self._bytes(item) <= AHEAD_BYTES)

    def _bytes(self, item: WorkItem) -> int:
        spec, rows = self.builders[item.stream].spec, item.stop - item.start
        length = spec.text.length if spec.text else spec.length or 0
        return prod(pixel_shape(spec, rows)) + 4 * rows * length

    def _check(self) -> None:
        try:
            for builder in self.builders.values():
                builder.check()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the workers and close files. The loader cannot be used afterwards."""
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
    """Batches made on this machine: by `workers` processes two steps ahead, or with 0 by a thread, one ahead."""

    def _open(self) -> Pool:
        self._prefetcher = Prefetcher.of(self.setups, self.rank, self.world_size)
        if self.workers:
            return ProcessPool(self.setups, self.workers, self.limits)
        return ThreadPool(self.builders, self.limits)

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return self._pool.pids if isinstance(self._pool, ProcessPool) else []


class RayLoader(Loader):
    """LocalLoader's interface and batches, bit for bit; `workers` actors a rank, on the cluster at RAY_ADDRESS.

    The nodes need dromos installed and a path to the shards; manifests and tokenizer travel with the actors.
    """

    def _open(self) -> Pool:
        return RayPool(self.setups, self.workers, self.rank * max(1, self.workers), self.limits)

    @property
    def places(self) -> list[tuple[str, int]]:
        """(node id, process id) of every actor."""
        assert isinstance(self._pool, RayPool)
        return self._pool.places()
