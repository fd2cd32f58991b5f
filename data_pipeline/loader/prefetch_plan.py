"""Plans the byte ranges to download next for a rank, from the order alone, within a byte limit.

Every source is planned one window ahead: as many steps as one window of its order lasts. Units are the groups of
samples that are fetched and cached together (sources/fetch_units.py).
"""

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

MIN_STEPS_AHEAD = 4  # the workers themselves are up to two steps ahead
# While the first window is downloaded, 1 / this number of an epoch's samples may be fetched one by one.
SAMPLES_PER_SINGLE_FETCH = 200


@dataclass
class SourceGroup:
    """Sources of one stream whose windows last about equally long, and the next step to plan for them."""

    builder: BatchBuilder
    names: list[str]
    next_step: int

    def steps_ahead(self, step: int) -> int:
        """Number of steps that one window lasts at the batch size of `step`."""
        return window_steps(self.builder.order, self.builder.spec.rows(step), self.names)


class PrefetchPlan:
    """Plans which units a rank's rows need from step `first` on, and which to fetch next.

    It plans one window ahead and records the last planned step that needs each unit. `held_bytes`, the size of the
    fetched units that are still needed, is at most `limit_bytes`, or the size of a single unit.
    """

    def __init__(
        self, builders: Sequence[BatchBuilder], rank: int, world_size: int, limit_bytes: int, first: int
    ) -> None:
        self._rank, self._world_size = rank, world_size
        self._limit = limit_bytes
        self._first = first
        self._last_use: dict[ByteRange, int] = {}
        self._units_by_last_use: dict[int, set[ByteRange]] = {}
        self._queue: deque[ByteRange] = deque()
        self._fetched: set[ByteRange] = set()
        self.held_bytes = 0
        self._builders = [builder for builder in builders if can_prefetch(builder.manifests.values())]
        self._groups: list[SourceGroup] = []
        for builder in self._builders:
            by_length: dict[int, list[str]] = {}
            for name, manifest in builder.manifests.items():
                if can_prefetch([manifest]):
                    steps = window_steps(builder.order, builder.spec.rows(first), [name])
                    by_length.setdefault(steps.bit_length(), []).append(name)
            self._groups += [SourceGroup(builder, names, first) for names in by_length.values()]

    def single_sample_steps(self) -> int:
        """Number of steps during which samples may be fetched one by one, while the first window is downloaded."""
        counts = [
            builder.order.samples_per_epoch() // SAMPLES_PER_SINGLE_FETCH // builder.spec.rows(self._first)
            for builder in self._builders
        ]
        return max(1, min(counts, default=1))

    def next_group(self, at: int, last: int) -> SourceGroup | None:
        """The group to plan next while step `at` is served and the run ends before `last`; None if all are planned."""
        for group in self._groups:
            group.next_step = max(group.next_step, at)
        unplanned = [
            group for group in self._groups if group.next_step < min(last, at + group.steps_ahead(at))
        ]
        return min(unplanned, key=lambda group: group.next_step, default=None)

    def plan_step(self, group: SourceGroup) -> None:
        """Plan the group's next step: queue the units that no planned step needs yet, in order of the rows."""
        builder, step = group.builder, group.next_step
        group.next_step += 1
        if builder.order.last_step is not None and step >= builder.order.last_step:
            return
        refs = builder.order.refs(step, *rows_of(self._rank, self._world_size, builder.spec.rows(step)))
        for name in group.names:
            units = builder.units(name)
            rows = np.flatnonzero(refs.source == builder.names.index(name))
            if units is not None and rows.size:
                for unit in _unit_ranges(units, refs.shard[rows], refs.index[rows]):
                    self._add_use(unit, step)

    def next_fetch(self) -> ByteRange | None:
        """The unit to fetch next; None if none is queued, or the limit is reached."""
        while self._queue:
            unit = self._queue[0]
            size = unit.stop - unit.start
            if unit in self._last_use:
                if self.held_bytes and self.held_bytes + size > self._limit:
                    return None
                self.held_bytes += size
                self._fetched.add(unit)
                return self._queue.popleft()
            self._queue.popleft()  # already released: no later step needs it
        return None

    @property
    def is_waiting(self) -> bool:
        """True if units are queued; if `next_fetch` has just returned None, the byte limit is reached."""
        return bool(self._queue)

    def release_before(self, step: int) -> list[ByteRange]:
        """Drop the units that only steps before `step` need; returns those of them that were fetched."""
        released = []
        for last_use in [last for last in self._units_by_last_use if last < step]:
            for unit in self._units_by_last_use.pop(last_use):
                del self._last_use[unit]
                if unit in self._fetched:
                    self._fetched.remove(unit)
                    self.held_bytes -= unit.stop - unit.start
                    released.append(unit)
        return released

    def _add_use(self, unit: ByteRange, step: int) -> None:
        before = self._last_use.get(unit)
        if before is None:
            self._queue.append(unit)
        elif before < step:
            self._units_by_last_use[before].discard(unit)
        else:
            return
        self._last_use[unit] = step
        self._units_by_last_use.setdefault(step, set()).add(unit)


def window_steps(order: StreamOrder, batch: int, names: Iterable[str]) -> int:
    """Number of steps of `batch` rows in which a lane consumes one window of the slowest of these sources."""
    longest = 0.0
    for source, weight in zip(order.sources, order.weights, strict=True):
        if weight and source.name in names:
            window = RUNS_PER_WINDOW * source.run if source.windows else source.samples / source.pieces
            window = min(window, MIN_WINDOWS_PER_PIECE * RUNS_PER_WINDOW * source.run)
            longest = max(longest, window * sum(order.weights) / weight)
    return max(MIN_STEPS_AHEAD, int(longest * order.lanes / batch) + 1)


def _unit_ranges(units: Units, shards: np.ndarray, indices: np.ndarray) -> Iterator[ByteRange]:
    """The byte range of every unit that holds one of the samples, each once, in order of first use."""
    numbers = units.numbers(shards, indices)
    _, first = np.unique(np.stack([shards, numbers]), axis=1, return_index=True)
    first.sort()
    first = first[[units.has_offsets(int(shard)) for shard in shards[first]]]
    starts, stops = units.ranges(shards[first], numbers[first])
    for shard, start, stop in zip(shards[first].tolist(), starts.tolist(), stops.tolist(), strict=True):
        yield units.byte_range(shard, start, stop)


def can_prefetch(manifests: Iterable[Manifest]) -> bool:
    """True if one of the sources can be fetched ahead: it is remote and has an offset index."""
    return any(storage.is_remote(manifest.root) and manifest.offsets is not None for manifest in manifests)
