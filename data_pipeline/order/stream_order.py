"""`StreamOrder`: the sample of every (step, row), as a pure function of recipe and seed.

The rows of a global batch are divided into lanes. A cycle of slots (mixture.py) assigns the rows of each lane to
sources, and the order of the source (source_order.py) gives the sample. Nothing depends on ranks or workers, so any
process can build any batch. The one exception: after an accepted change of the mixture, the order also depends on the
earlier mixture (state.py).
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
from data_pipeline.order.state import History, ResumeResult, Segment, SourceBase, resume_segments

MAX_LANES = 1024
UNREACHABLE_DRAWS = (
    2**53
)  # more samples of one source than any run draws; sums of draws do not overflow int64


@dataclass(frozen=True)
class SourceCounts:
    """One source of a mixture: samples by shard, and the keys that set its share of the stream.

    `weight` is a share in proportion to the other weights. If no source has a weight, shares are proportional to
    size = samples x `repeat`, at most `cap`. If only some have one, weights are fractions of the stream, and the other
    sources share the rest by size. The source ends after `max_epochs` passes over its samples.
    """

    name: str
    counts: np.ndarray
    weight: float | None = None
    repeat: float | None = None
    cap: int | None = None
    max_epochs: float | None = None


@dataclass(frozen=True)
class SampleRefs:
    """References to the samples of some rows; every field is int64 [rows].

    row: in the global batch; source: number in the mixture; shard, index: position of the sample in its source
    """

    row: np.ndarray
    source: np.ndarray
    epoch: np.ndarray
    shard: np.ndarray
    index: np.ndarray


@dataclass(frozen=True)
class Phase:
    """Steps from `first_step` on, in which `cycle` assigns rows to sources; a new phase starts when a source ends.

    begin: samples that each lane has served before this phase
    drawn: draws of each source before this phase, int64 [sources, lanes]
    """

    first_step: int
    begin: int
    cycle: Cycle
    drawn: np.ndarray


class StreamOrder:
    """The order of one stream.

    seed: any integer below 2**64, see `stream_seed`
    share_by: how sources without a weight share the stream
    segments: result of `resume` if the mixture changed during the run; the last one belongs to `sources`

    Raises UserError for invalid batches, lanes, names or shares.
    """

    def __init__(
        self,
        sources: Sequence[SourceCounts],
        batch: int | Mapping[int, int] | BatchSchedule,
        lanes: int | None,
        seed: int,
        share_by: ShareBy = "size",
        segments: Sequence[Segment] = (),
    ) -> None:
        self.batches = BatchSchedule.of(batch)
        self.lanes = choose_lanes(self.batches, lanes)
        self.seed = seed
        names = [source.name for source in sources]
        if not names or len(set(names)) < len(names):
            raise UserError(f"a stream needs one or more sources with different names; it has {names}")
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
        self.weights = integer_weights(source_shares(named, sizes, share_by), names)
        self._epoch_samples = ceil(sum(sizes))
        self._limits = [
            None if source.max_epochs is None else exact_fraction(source.max_epochs) for source in sources
        ]
        self.mixture_hash = self._mixture_hash()
        self._locator = SampleLocator(self.sources)
        self._interleaved = np.array([source.interleaved for source in self.sources])
        self.ends: dict[str, int] = {}  # source -> first step after its max_epochs
        # First step after the max_epochs of all sources; None: the stream never ends.
        self.last_step: int | None = None
        self.segment = segments[-1] if segments else self._segment({})
        self._phases: list[Phase] = []
        self._plan_phases()

    def refs(self, step: int, start: int = 0, stop: int | None = None) -> SampleRefs:
        """Samples of rows [start, stop) of the global batch of `step`; steps and rows count from 0.

        Raises UserError after the end of the stream.
        """
        batch = self.batches.at(step)
        stop = batch if stop is None else stop
        if step < self.segment.first_step or not 0 <= start <= stop <= batch:
            raise ValueError(
                f"no rows [{start}, {stop}) of step {step} in batches of {batch} from step {self.segment.first_step} on"
            )
        if self.last_step is not None and step >= self.last_step:
            raise UserError(
                f"the stream has ended: all its sources reach their max_epochs after {self.last_step} steps; "
                f"train for at most {self.last_step} steps, or raise max_epochs"
            )
        rows = np.arange(start, stop)
        if not rows.size:
            return SampleRefs(*np.zeros((5, 0), np.int64))
        lane = rows // (batch // self.lanes)
        source, draw = self._assign_rows(step, rows)
        return SampleRefs(rows, source, *self._locator.refs(source, lane, draw))

    def replacement(self, source: int, shard: int, index: int, epoch: int, attempt: int) -> tuple[int, int]:
        """Shard and index of the sample that replaces a bad one; see SourceOrder.replacement."""
        return self.sources[source].replacement(shard, index, epoch, attempt)

    def samples_per_epoch(self) -> int:
        """Rows in one epoch of the stream: the sum of its sources' sizes (samples x repeat, at most cap)."""
        return self._epoch_samples

    def steps(self, samples: int) -> int:
        """Smallest number of steps of the run with at least `samples` rows; at least the first step of this segment."""
        first = self.segment.first_step
        before = self.segment.consumed_per_lane * self.lanes
        if samples <= before:
            return first
        return self.batches.steps(self.batches.before(first) + samples - before)

    def consumed(self, step: int) -> dict[str, int]:
        """Samples drawn from each source before `step`, sources that were removed included."""
        phase, slots = self._phase(step)
        here = phase.drawn - self._drawn_before() + phase.cycle.consumed(np.arange(self.lanes), slots)
        total = self._history.totals() if self._history else {}
        for source, drawn in zip(self.sources, here.sum(axis=1).tolist(), strict=True):
            total[source.name] = total.get(source.name, 0) + drawn
        return total

    def state(self, step: int, fingerprints: Mapping[str, str] | None = None) -> dict[str, Any]:
        """State of a checkpoint after `step` steps, as a JSON object; `resume` reads it, also with changed data.

        `fingerprints`: source name -> fingerprint of its manifest.
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
            "segments": [
                segment.to_json() for segment in (*(self._history.segments if self._history else ()), now)
            ],
        }

    def resume(
        self,
        state: Mapping[str, Any],
        fingerprints: Mapping[str, str] | None = None,
        accept_change: bool = False,
    ) -> ResumeResult:
        """Segments with which a StreamOrder of this mixture continues after `state`.

        Raises UserError with the old and the new value of everything that differs from `state`. With `accept_change`
        it opens a new segment instead; seed and lanes can never change.
        """
        now = self._segment(dict(fingerprints or {}))
        return resume_segments(state, now, hex16(self.seed), self.lanes, self.batches, accept_change)

    def _segment(self, fingerprints: dict[str, str]) -> Segment:
        """First segment of a run with this mixture."""
        names = [source.name for source in self.sources]
        return Segment(
            first_step=0,
            consumed_per_lane=0,
            mixture_hash=self.mixture_hash,
            sources=tuple(names),
            fingerprints=fingerprints,
            samples={source.name: source.samples for source in self.sources},
            count_hashes={source.name: source.counts_hash for source in self.sources},
            weights=dict(zip(names, self.weights, strict=True)),
            max_epochs={name: str(limit) for name, limit in zip(names, self._limits, strict=True)},
            base={name: SourceBase(0) for name in names},
            unvisited={},
        )

    def _served_per_lane(self, step: int) -> int:
        """Samples that each lane serves before `step`."""
        rows = self.batches.before(step) - self.batches.before(self.segment.first_step)
        return self.segment.consumed_per_lane + rows // self.lanes

    def _assign_rows(self, step: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source number and draw number of each row.

        Draws count per lane, or over all lanes if the source is interleaved.
        """
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
        """Phase of a step, and the slots of each lane in this phase before that step."""
        phase = next(s for s in reversed(self._phases) if s.first_step <= step)
        return phase, self._served_per_lane(step) - phase.begin

    def _drawn(self, step: int) -> np.ndarray:
        """Draws of each source before `step`, int64 [sources, lanes]."""
        phase, slots = self._phase(step)
        return phase.drawn + phase.cycle.consumed(np.arange(self.lanes), slots)

    def _drawn_before(self) -> np.ndarray:
        """Draws of the sources' current samples before this segment, int64 [sources, lanes]."""
        if self._history is None:
            return np.zeros((len(self.sources), self.lanes), np.int64)
        return np.stack(
            [self._history.since(s.name, self._base[s.name].segment, self.lanes) for s in self.sources]
        )

    def _plan_phases(self) -> None:
        """Compute the phases: when a source reaches its max_epochs, the other sources share its slots."""
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
        """First step after all passes of source `k`; passes over earlier versions of its samples count too."""
        source, first = self.sources[k], self._phases[-1].first_step
        left = passes - Fraction(self._base[source.name].passes)
        goal = ceil(left * source.samples / source.pieces)

        def has_ended(step: int) -> bool:
            drawn = self._drawn(step)[k]
            return bool((drawn.sum() if source.interleaved else drawn.min()) >= goal)

        high = first + 1
        while not has_ended(high):
            high = first + 2 * (high - first)
        return bisect_left(range(first, high), True, key=has_ended) + first

    def _mixture_hash(self) -> str:
        """Hash of lanes, sources, counts, weights and max_epochs: equal hashes mean the same order."""
        sources = [
            [source.name, source.counts_hash, weight, str(limit)]
            for source, weight, limit in zip(self.sources, self.weights, self._limits, strict=True)
        ]
        return xxhash.xxh64_hexdigest(dumps({"lanes": self.lanes, "sources": sources}).encode())


def choose_lanes(batches: BatchSchedule, lanes: int | None) -> int:
    """Number of lanes: `lanes` from the recipe, by default the largest common divisor of all batches up to 1024.

    Raises UserError if `lanes` does not divide every batch.
    """
    common = batches.divisor
    if lanes is None:
        return max(d for d in range(1, min(common, MAX_LANES) + 1) if common % d == 0)
    if lanes < 1 or common % lanes:
        near = min((d for d in range(1, common + 1) if common % d == 0), key=lambda d: abs(d - lanes))
        batch = "the batch" if len(batches.rows) == 1 else "every batch"
        raise UserError(
            f"lanes: {lanes} does not divide {batch} of {batches}; the nearest number that does is {near}"
        )
    return lanes


def stream_seed(run_seed: int, stage: str, stream: str) -> int:
    """Order seed of one stream of one stage; by default two stages share neither order nor crops."""
    return int(hash64(run_seed, key64(stage), key64(stream)))


def sample_ids(source_name: str, shards: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Identifiers of samples, uint64 [rows]: the same in every epoch, stage and run."""
    return hash64(key64(source_name), shards, indices)


def row_keys(
    seed: int,
    source_name: str,
    shard: np.ndarray,
    index: np.ndarray,
    epoch: np.ndarray,
    attempt: np.ndarray | int,
) -> np.ndarray:
    """Key of every random choice of a row, uint64 [rows]; to be used as `hash64(key, Purpose.CROP)`."""
    return hash64(seed, key64(source_name), shard, index, epoch, attempt)
