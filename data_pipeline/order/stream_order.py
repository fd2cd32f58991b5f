"""Which sample stands in which row of which step: a pure function of the recipe, so that anyone can make any batch.

A stream's rows are split into lanes; a cycle of slots (mixture.py) deals each lane's rows to the sources, and each
source's own order (source_order.py, walk.py) says which sample that is. Nothing here depends on ranks or workers,
nor on the past but for the changes of the mixture that a user has accepted (segments.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from json import dumps
from math import ceil
from typing import Any

import numpy as np
import xxhash

from data_pipeline.errors import UserError
from data_pipeline.hashing import hash64, key64
from data_pipeline.order.batch_schedule import BatchSchedule
from data_pipeline.order.digest import hex16
from data_pipeline.order.mixture import Cycle, count_earlier_equal
from data_pipeline.order.mixture_weights import (
    ShareBy,
    exact_fraction,
    integer_weights,
    source_shares,
    source_size,
)
from data_pipeline.order.source_order import SampleLocator, SourceOrder
from data_pipeline.order.state import History, Resumed, Segment, SourceBase, resume_segments

MAX_LANES = 1024
UNREACHABLE_DRAWS = 2**53  # draws of a source that no run gets to; far below where sums of them overflow


@dataclass(frozen=True)
class SourceCounts:
    """One source of a mixture: samples by shard, and how its share of the stream is set.

    `weight` is a share in proportion to the other weights; without any, shares follow size = samples x `repeat`, at
    most `cap`. Where some sources have a weight and some have none, weights are fractions of the stream and the rest
    of it is split by size. `max_epochs` ends the source after so many passes.
    """

    name: str
    counts: np.ndarray
    weight: float | None = None
    repeat: float | None = None
    cap: int | None = None
    max_epochs: float | None = None


@dataclass(frozen=True)
class SampleRefs:
    """Samples of some rows, arrays of [rows]: row of the global batch, source in the mixture, epoch, shard, index."""

    row: np.ndarray
    source: np.ndarray
    epoch: np.ndarray
    shard: np.ndarray
    index: np.ndarray


@dataclass(frozen=True)
class Phase:
    """From `first_step` on, when each lane has served `begin` samples, slots are dealt by `cycle`.

    `drawn` [sources, lanes] is what was dealt before.
    """

    first_step: int
    begin: int
    cycle: Cycle
    drawn: np.ndarray


class StreamOrder:
    """The order of one stream. `seed` is any integer below 2**64, see `stream_seed`.

    `by` says how sources without a weight share the stream. `segments` are those that `resume` gave, when a run goes
    on with a changed mixture; the last of them is of the mixture given here.
    """

    def __init__(
        self,
        sources: Sequence[SourceCounts],
        batch: int | Mapping[int, int] | BatchSchedule,
        lanes: int | None,
        seed: int,
        by: ShareBy = "size",
        segments: Sequence[Segment] = (),
    ) -> None:
        self.batches = BatchSchedule.of(batch)
        self.lanes = choose_lanes(self.batches, lanes)
        self.seed = seed
        names = [source.name for source in sources]
        if not names or len(set(names)) < len(names):
            raise UserError(
                f"a stream needs one or more sources, each under a name of its own; it has {names}"
            )
        self._history = (
            History.of(segments[:-1], segments[-1].consumed_per_lane, self.lanes) if segments else None
        )
        self._base = segments[-1].base if segments else {name: SourceBase(0) for name in names}
        self.sources = [
            SourceOrder(source.name, source.counts, self.lanes, seed, self._base[source.name].first_epoch)
            for source in sources
        ]
        named = {source.name: source for source in sources}
        sizes = [source_size(order.name, named[order.name], order.samples) for order in self.sources]
        self.weights = integer_weights(source_shares(named, sizes, by), names)
        self._epoch_samples = ceil(sum(sizes))
        self._limits = [
            None if source.max_epochs is None else exact_fraction(source.max_epochs) for source in sources
        ]
        self.mixture_hash = self._mixture_hash()
        self._locator = SampleLocator(self.sources)
        self._interleaved = np.array([source.interleaved for source in self.sources])
        self.ends: dict[str, int] = {}  # source -> step from which on its max_epochs are over
        self.last_step: int | None = None  # step at which all sources have ended
        self.segment = segments[-1] if segments else self._segment({})
        self._phases: list[Phase] = []
        self._plan_phases()

    def refs(self, step: int, start: int = 0, stop: int | None = None) -> SampleRefs:
        """Samples of rows [start, stop) of the global batch of `step`; both count from 0."""
        batch = self.batches.at(step)
        stop = batch if stop is None else stop
        if step < self.segment.first_step or not 0 <= start <= stop <= batch:
            raise ValueError(
                f"no rows [{start}, {stop}) of step {step} in batches of {batch} from step {self.segment.first_step} on"
            )
        if self.last_step is not None and step >= self.last_step:
            raise UserError(
                f"the stream is over: all its sources reach their max_epochs after {self.last_step} steps; "
                "train no longer than that, or raise max_epochs"
            )
        rows = np.arange(start, stop)
        if not rows.size:
            return SampleRefs(*np.zeros((5, 0), np.int64))
        lane = rows // (batch // self.lanes)
        source, draw = self._deal_rows(step, rows)
        return SampleRefs(rows, source, *self._locator.refs(source, lane, draw))

    def replacement(self, source: int, shard: int, index: int, epoch: int, attempt: int) -> tuple[int, int]:
        """Shard and index of the sample that replaces a bad one at `attempt` >= 1; see SourceOrder.replacement."""
        return self.sources[source].replacement(shard, index, epoch, attempt)

    def samples_per_epoch(self) -> int:
        """Rows in one epoch of the stream: the sum of its sources' sizes (samples x repeat, at most cap)."""
        return self._epoch_samples

    def steps(self, samples: int) -> int:
        """The fewest steps of the run that have at least so many rows; at least the present segment's first."""
        first = self.segment.first_step
        before = self.segment.consumed_per_lane * self.lanes
        if samples <= before:
            return first
        return self.batches.steps(self.batches.before(first) + samples - before)

    def consumed(self, step: int) -> dict[str, int]:
        """Samples that the steps before `step` took of each source, also of those that have left."""
        phase, slots = self._phase(step)
        here = phase.drawn - self._drawn_before() + phase.cycle.consumed(np.arange(self.lanes), slots)
        total = self._history.totals() if self._history else {}
        for source, drawn in zip(self.sources, here.sum(axis=1).tolist(), strict=True):
            total[source.name] = total.get(source.name, 0) + drawn
        return total

    def state(self, step: int, fingerprints: Mapping[str, str] | None = None) -> dict[str, Any]:
        """What a checkpoint after `step` steps keeps, as JSON: enough for `resume` to go on, also with other data.

        `fingerprints` are the sources' manifests'.
        """
        cycles = tuple((phase.begin, tuple(phase.cycle.weights.tolist())) for phase in self._phases)
        now = replace(self.segment, fingerprints=dict(fingerprints or {}), cycles=cycles)
        return {
            "step": step,
            "seed": hex16(self.seed),
            "batch": self.batches.to_json(),
            "lanes": self.lanes,
            "consumed_per_lane": self._served_per_lane(step),
            "consumed": self.consumed(step),
            "segments": [one.to_json() for one in (*(self._history.segments if self._history else ()), now)],
        }

    def resume(
        self,
        state: Mapping[str, Any],
        fingerprints: Mapping[str, str] | None = None,
        accept_change: bool = False,
    ) -> Resumed:
        """The segments with which an order of this mixture goes on after `state`.

        Raises UserError with both values of all that differs from what the state was written with, unless
        `accept_change` allows it: then a segment is opened. Seed and lanes never change.
        """
        now = self._segment(dict(fingerprints or {}))
        return resume_segments(state, now, hex16(self.seed), self.lanes, self.batches, accept_change)

    def _segment(self, fingerprints: dict[str, str]) -> Segment:
        """The first segment of a run with this mixture."""
        names = [source.name for source in self.sources]
        return Segment(
            first_step=0,
            consumed_per_lane=0,
            mixture_hash=self.mixture_hash,
            sources=tuple(names),
            fingerprints=fingerprints,
            samples={source.name: source.samples for source in self.sources},
            counts={source.name: source.counts_hash for source in self.sources},
            weights=dict(zip(names, self.weights, strict=True)),
            max_epochs={name: str(limit) for name, limit in zip(names, self._limits, strict=True)},
            base={name: SourceBase(0) for name in names},
            unvisited={},
        )

    def _served_per_lane(self, step: int) -> int:
        """Samples that each lane has served before `step`."""
        rows = self.batches.before(step) - self.batches.before(self.segment.first_step)
        return self.segment.consumed_per_lane + rows // self.lanes

    def _deal_rows(self, step: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each row, and which draw of it: by lane, or counted over all lanes where it is interleaved."""
        phase, slots = self._phase(step)
        per_lane = self.batches.at(step) // self.lanes
        lane = np.arange(self.lanes)
        if not self._interleaved.any():
            lane = lane[int(rows[0]) // per_lane : int(rows[-1]) // per_lane + 1]
        source = phase.cycle.sources(lane[:, None], slots + np.arange(per_lane))
        drawn = phase.drawn[:, lane] + phase.cycle.consumed(lane, slots)
        draw = drawn[source, np.arange(lane.size)[:, None]] + count_earlier_equal(source)
        if self._interleaved.any():
            over_lanes = count_earlier_equal(source.T.reshape(1, -1)).reshape(per_lane, -1).T
            draw = np.where(self._interleaved[source], drawn.sum(axis=1)[source] + over_lanes, draw)
        at = rows - lane[0] * per_lane
        return source.reshape(-1)[at], draw.reshape(-1)[at]

    def _phase(self, step: int) -> tuple[Phase, int]:
        """The phase of a step, and the slots that each lane dealt in it before that step."""
        phase = next(s for s in reversed(self._phases) if s.first_step <= step)
        return phase, self._served_per_lane(step) - phase.begin

    def _drawn(self, step: int) -> np.ndarray:
        phase, slots = self._phase(step)
        return phase.drawn + phase.cycle.consumed(np.arange(self.lanes), slots)

    def _drawn_before(self) -> np.ndarray:
        """Draws, int64 [sources, lanes], that the sources go on from at the present segment's start."""
        if self._history is None:
            return np.zeros((len(self.sources), self.lanes), np.int64)
        return np.stack(
            [self._history.since(s.name, self._base[s.name].segment, self.lanes) for s in self.sources]
        )

    def _plan_phases(self) -> None:
        """Lay out the phases: at the step where a source has had its max_epochs, the others share its slots."""
        weights = list(self.weights)
        step, drawn = self.segment.first_step, self._drawn_before()
        while any(weights):
            self._phases.append(Phase(step, self._served_per_lane(step), Cycle(weights, self.lanes), drawn))
            ends = {
                k: self._end_step(k, limit)
                for k, limit in enumerate(self._limits)
                if limit is not None and weights[k] and limit * self.sources[k].samples < UNREACHABLE_DRAWS
            }
            if not ends:
                return
            step = min(ends.values())
            drawn = self._drawn(step)
            for k in (k for k, end in ends.items() if end == step):
                self.ends[self.sources[k].name], weights[k] = step, 0
        self.last_step = step

    def _end_step(self, k: int, passes: Fraction) -> int:
        """First step before which source `k` has had all its passes, those over samples it had earlier included."""
        source, first = self.sources[k], self._phases[-1].first_step
        left = passes - Fraction(self._base[source.name].passes)
        goal = ceil(left * source.samples / source.pieces)

        def over(step: int) -> bool:
            drawn = self._drawn(step)[k]
            return bool((drawn.sum() if source.interleaved else drawn.min()) >= goal)

        high = first + 1
        while not over(high):
            high = first + 2 * (high - first)
        return bisect_left(range(first, high), True, key=over) + first

    def _mixture_hash(self) -> str:
        sources = [
            [source.name, source.counts_hash, weight, str(limit)]
            for source, weight, limit in zip(self.sources, self.weights, self._limits, strict=True)
        ]
        return xxhash.xxh64_hexdigest(dumps({"lanes": self.lanes, "sources": sources}).encode())


def choose_lanes(batches: BatchSchedule, lanes: int | None) -> int:
    """Lanes of a stream: what the recipe says if it divides every batch, else their largest divisor up to 1024."""
    common = batches.divisor
    if lanes is None:
        return max(d for d in range(1, min(common, MAX_LANES) + 1) if common % d == 0)
    if lanes < 1 or common % lanes:
        near = min((d for d in range(1, common + 1) if common % d == 0), key=lambda d: abs(d - lanes))
        what = "the batch" if len(batches.rows) == 1 else "every batch"
        raise UserError(
            f"lanes: {lanes} does not divide {what} of {batches}; the nearest number that does is {near}"
        )
    return lanes


def stream_seed(run_seed: int, stage: str, stream: str) -> int:
    """Order seed of one stream of one stage, so that two stages share neither order nor crops unless they ask to."""
    return int(hash64(run_seed, key64(stage), key64(stream)))


def sample_ids(source_name: str, shards: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Identity of samples, uint64 [rows]: the same in every epoch, stage and run."""
    return hash64(key64(source_name), shards, indices)


def row_keys(
    seed: int,
    source_name: str,
    shard: np.ndarray,
    index: np.ndarray,
    epoch: np.ndarray,
    attempt: np.ndarray | int,
) -> np.ndarray:
    """Key of all randomness of a row, uint64 [rows]: use it as `hash64(key, Purpose.CROP)` and the like."""
    return hash64(seed, key64(source_name), shard, index, epoch, attempt)
