"""What to fetch ahead for a rank's rows: from the order alone, each source as far as a window of it lasts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline import storage
from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.work_items import rows_of
from data_pipeline.order.source_order import MIN_WINDOWS_PER_PIECE, RUNS_PER_WINDOW
from data_pipeline.order.stream_order import StreamOrder
from data_pipeline.sources.fetch_units import Units
from data_pipeline.sources.manifest import Manifest
from data_pipeline.storage.cache import ByteRange

LEAST_AHEAD = 4  # steps; workers are at two of them
ALONE = (
    200  # of so many samples of an epoch, one may be fetched by itself while the first window is on its way
)


@dataclass
class Reach:
    """Sources of a stream whose windows last about equally long, and the next step to plan for them."""

    builder: BatchBuilder
    names: list[str]
    next: int

    def ahead(self, step: int) -> int:
        """Steps that a window lasts."""
        return window_steps(self.builder.order, self.builder.spec.rows(step), self.names)


class Plan:
    """Which units a rank's rows need from step `first` on, and which of them to fetch next.

    Each source is looked ahead as far as a window of it lasts, so that it is known which units are needed still; what
    is fetched and needed still is at most `limit_bytes`.
    """

    def __init__(
        self, builders: Sequence[BatchBuilder], rank: int, world_size: int, limit_bytes: int, first: int
    ) -> None:
        self._rank, self._world_size = rank, world_size
        self._limit = limit_bytes
        self._first = first
        self._last_use: dict[ByteRange, int] = {}
        self._ending: dict[int, set[ByteRange]] = {}
        self._queue: deque[ByteRange] = deque()
        self._fetched: set[ByteRange] = set()
        self.held = 0
        self._makers = [builder for builder in builders if prefetched(builder.manifests.values())]
        self._reaches: list[Reach] = []
        for builder in self._makers:
            alike: dict[int, list[str]] = {}
            for name, manifest in builder.manifests.items():
                if prefetched([manifest]):
                    steps = window_steps(builder.order, builder.spec.rows(first), [name])
                    alike.setdefault(steps.bit_length(), []).append(name)
            self._reaches += [Reach(builder, names, first) for names in alike.values()]

    def alone(self) -> int:
        """Steps for which samples may be fetched one by one."""
        counts = [
            builder.order.samples_per_epoch() // ALONE // builder.spec.rows(self._first)
            for builder in self._makers
        ]
        return max(1, min(counts, default=1))

    def following(self, at: int, last: int) -> Reach | None:
        """What to look at next while step `at` is served and steps end before `last`; None: nothing now."""
        for reach in self._reaches:
            reach.next = max(reach.next, at)
        waiting = [reach for reach in self._reaches if reach.next < min(last, at + reach.ahead(at))]
        return min(waiting, key=lambda reach: reach.next, default=None)

    def look(self, reach: Reach) -> None:
        """Queue the units that its next step needs and no step looked at before, in order of the rows."""
        builder, step = reach.builder, reach.next
        reach.next += 1
        if builder.order.last_step is not None and step >= builder.order.last_step:
            return
        refs = builder.order.refs(step, *rows_of(self._rank, self._world_size, builder.spec.rows(step)))
        for name in reach.names:
            units = builder.units(name)
            rows = np.flatnonzero(refs.source == builder.names.index(name))
            if units is not None and rows.size:
                for part in _parts(units, refs.shard[rows], refs.index[rows]):
                    self._use(part, step)

    def take(self) -> ByteRange | None:
        """The unit to fetch next; None if there is none, or no room before others are used up."""
        while self._queue:
            part = self._queue[0]
            size = part.stop - part.start
            if part in self._last_use:
                if self.held and self.held + size > self._limit:
                    return None
                self.held += size
                self._fetched.add(part)
                return self._queue.popleft()
            self._queue.popleft()  # over before its turn came
        return None

    @property
    def full(self) -> bool:
        """Is there something to fetch that there is no room for?"""
        return bool(self._queue)

    def served(self, step: int) -> list[ByteRange]:
        """Fetched units that no step from `step` on needs, of those looked at; they are let go of."""
        gone = []
        for past in [end for end in self._ending if end < step]:
            for part in self._ending.pop(past):
                del self._last_use[part]
                if part in self._fetched:
                    self._fetched.remove(part)
                    self.held -= part.stop - part.start
                    gone.append(part)
        return gone

    def _use(self, part: ByteRange, step: int) -> None:
        before = self._last_use.get(part)
        if before is None:
            self._queue.append(part)
        elif before < step:
            self._ending[before].discard(part)
        else:
            return
        self._last_use[part] = step
        self._ending.setdefault(step, set()).add(part)


def window_steps(order: StreamOrder, batch: int, names: Iterable[str]) -> int:
    """Steps of `batch` rows in which a lane uses up a window of one of these sources, where that takes longest."""
    longest = 0.0
    for source, weight in zip(order.sources, order.weights, strict=True):
        if weight and source.name in names:
            window = RUNS_PER_WINDOW * source.run if source.windows else source.samples / source.pieces
            window = min(window, MIN_WINDOWS_PER_PIECE * RUNS_PER_WINDOW * source.run)
            longest = max(longest, window * sum(order.weights) / weight)
    return max(LEAST_AHEAD, int(longest * order.lanes / batch) + 1)


def _parts(units: Units, shards: np.ndarray, indices: np.ndarray) -> Iterator[ByteRange]:
    """The units that samples lie in, each once, in order of first use."""
    numbers = units.number(shards, indices)
    _, first = np.unique(np.stack([shards, numbers]), axis=1, return_index=True)
    first.sort()
    first = first[[units.knows(int(shard)) for shard in shards[first]]]
    starts, stops = units.ranges(shards[first], numbers[first])
    for shard, start, stop in zip(shards[first].tolist(), starts.tolist(), stops.tolist(), strict=True):
        yield units.part(shard, start, stop)


def prefetched(manifests: Iterable[Manifest]) -> bool:
    """Is there a source among these that can be fetched ahead: remote, and its samples' places known?"""
    return any(storage.is_remote(manifest.root) and manifest.offsets is not None for manifest in manifests)
