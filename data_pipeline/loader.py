"""Steps of a rank, in order, made ahead of time by local workers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

from data_pipeline.batches import BatchMaker
from data_pipeline.pool import Pool, ProcessPool, ThreadPool
from data_pipeline.spec import Batch, StreamSpec
from data_pipeline.work import Setup, check_ranks, items_of, micro_batches, rows_of

__all__ = ["Loader", "LocalLoader", "micro_batches", "rows_of"]


class Loader:
    """What local and Ray loaders share. A step's batches do not depend on who makes them, nor on what came before.

    Opening it reads one sample of every source, so that a source without images ends here in a UserError.
    makers: stream -> BatchMaker, for its order, manifests and tokenizer; those handed in are taken as checked
    wait_seconds: how long the caller waited for the step that was yielded last
    """

    def __init__(
        self,
        specs: Sequence[StreamSpec],
        rank: int,
        world_size: int,
        workers: int,
        micro_batch: int | None = None,
        makers: Mapping[str, BatchMaker] | None = None,
    ) -> None:
        check_ranks(specs, world_size)
        self.specs = list(specs)
        self.rank = rank
        self.world_size = world_size
        self.workers = workers
        self.micro_batch = micro_batch
        self.wait_seconds = 0.0
        self.makers = dict(makers or {})
        if makers is None:
            self.makers = {spec.name: BatchMaker(spec) for spec in self.specs}
            for maker in self.makers.values():
                maker.check()
        self._pool: Pool = self._open()

    def _open(self) -> Pool:
        raise NotImplementedError

    @property
    def setups(self) -> list[Setup]:
        return [Setup(maker.spec, maker.manifests, maker.tokenizer) for maker in self.makers.values()]

    def steps(self, first: int, last: int) -> Iterator[dict[str, list[Batch]]]:
        """Steps first, ..., last - 1, counted from 0, as range() does: stream -> this rank's micro-batches."""
        asked: deque[list[tuple[str, int]]] = deque()
        try:
            for step in range(first, last):
                began = time.perf_counter()
                while len(asked) <= self._pool.ahead and step + len(asked) < last:
                    items = items_of(
                        self.specs, step + len(asked), self.rank, self.world_size, self.micro_batch
                    )
                    asked.append([(item.stream, self._pool.submit(item)) for item in items])
                found: dict[str, list[Batch]] = {spec.name: [] for spec in self.specs}
                for stream, ticket in asked.popleft():
                    found[stream].append(self._pool.result(ticket))
                self.wait_seconds = time.perf_counter() - began
                yield found
        finally:
            self._pool.cancel()

    def close(self) -> None:
        """Stop the workers and close files. The loader cannot be used afterwards."""
        self._pool.close()
        for maker in self.makers.values():
            maker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LocalLoader(Loader):
    """Batches made on this machine: by `workers` processes two steps ahead, or with 0 by a thread, one ahead."""

    def _open(self) -> Pool:
        return ProcessPool(self.setups, self.workers) if self.workers else ThreadPool(self.makers)

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return self._pool.pids if isinstance(self._pool, ProcessPool) else []
