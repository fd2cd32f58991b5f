"""Which sample stands in which row of which step: a pure function of the recipe, so that anyone can make any batch.

A stream's rows are split into lanes; a cycle of slots (mixture.py) deals each lane's rows to the sources, and each
source's own order (source_order.py) says which sample that is. Nothing here depends on ranks, workers or the past.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from json import dumps
from math import ceil
from typing import Any

import numpy as np
import xxhash

from data_pipeline.digest import hex16
from data_pipeline.errors import UserError
from data_pipeline.hashing import hash64, key64
from data_pipeline.mixture import Cycle
from data_pipeline.shares import exact, integer_weights, shares, size
from data_pipeline.source_order import SourceOrder

MOST_LANES = 1024


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
class Refs:
    """Samples of some rows, arrays of [rows]: row of the global batch, source in the mixture, epoch, shard, index."""

    row: np.ndarray
    source: np.ndarray
    epoch: np.ndarray
    shard: np.ndarray
    index: np.ndarray


@dataclass(frozen=True)
class Segment:
    """From `first_step` on, slots are dealt by `cycle`; `drawn` [sources, lanes] is what was dealt before."""

    first_step: int
    cycle: Cycle
    drawn: np.ndarray


class StreamOrder:
    """The order of one stream. `seed` is any integer below 2**64, see `stream_seed`."""

    def __init__(self, sources: Sequence[SourceCounts], batch: int, lanes: int | None, seed: int) -> None:
        self.batch = batch
        self.lanes = choose_lanes(batch, lanes)
        self.seed = seed
        names = [source.name for source in sources]
        if not names or len(set(names)) < len(names):
            raise UserError(
                f"a stream needs one or more sources, each under a name of its own; it has {names}"
            )
        self.sources = [SourceOrder(source.name, source.counts, self.lanes, seed) for source in sources]
        named = {source.name: source for source in sources}
        sizes = [size(order.name, named[order.name], order.samples) for order in self.sources]
        self.weights = integer_weights(shares(named, sizes), names)
        self._epoch_samples = ceil(sum(sizes))
        self._limits = [None if source.max_epochs is None else exact(source.max_epochs) for source in sources]
        self.mixture_hash = self._hash()
        self.ends: dict[str, int] = {}  # source -> step from which on its max_epochs are over
        self.last_step: int | None = None  # step at which all sources have ended
        self.segments: list[Segment] = []
        self._plan()

    def refs(self, step: int, start: int = 0, stop: int | None = None) -> Refs:
        """Samples of rows [start, stop) of the global batch of `step`; both count from 0."""
        stop = self.batch if stop is None else stop
        if step < 0 or not 0 <= start <= stop <= self.batch:
            raise ValueError(f"no rows [{start}, {stop}) of step {step} in batches of {self.batch}")
        if self.last_step is not None and step >= self.last_step:
            raise UserError(
                f"the stream is over: all its sources reach their max_epochs after {self.last_step} steps; "
                "train no longer than that, or raise max_epochs"
            )
        rows = np.arange(start, stop)
        per_lane = self.batch // self.lanes
        lane = rows // per_lane
        source, draw = self._deal(step, rows)
        out = np.zeros((3, rows.size), np.int64)
        for k, order in enumerate(self.sources):
            if len(self.sources) == 1:
                out[:] = order.refs(lane, draw)
            elif (chosen := np.flatnonzero(source == k)).size:
                out[:, chosen] = order.refs(lane[chosen], draw[chosen])
        return Refs(rows, source, *out)

    def replacement(self, source: int, shard: int, index: int, epoch: int, attempt: int) -> tuple[int, int]:
        """Shard and index of the sample that replaces a bad one at `attempt` >= 1; see SourceOrder.replacement."""
        return self.sources[source].replacement(shard, index, epoch, attempt)

    def samples_per_epoch(self) -> int:
        """Rows in one epoch of the stream: the sum of its sources' sizes (samples x repeat, at most cap)."""
        return self._epoch_samples

    def consumed(self, step: int) -> dict[str, int]:
        """Samples that the steps before `step` took of each source."""
        return dict(zip((s.name for s in self.sources), self._drawn(step).sum(axis=1).tolist(), strict=True))

    def state(self, step: int, fingerprints: Mapping[str, str] | None = None) -> dict[str, Any]:
        """What a checkpoint after `step` steps keeps, as JSON: enough to say on resume that nothing has changed.

        `fingerprints` are the sources' manifests'. One segment, since a mixture cannot change yet while it runs.
        """
        names = [source.name for source in self.sources]
        segment = {
            "first_step": 0,
            "mixture_hash": self.mixture_hash,
            "fingerprints": dict(fingerprints or {}),
            "samples": {source.name: source.samples for source in self.sources},
            "weights": dict(zip(names, self.weights, strict=True)),
            "max_epochs": {name: str(limit) for name, limit in zip(names, self._limits, strict=True)},
            "consumed_per_lane": 0,
            "base": dict.fromkeys(names, 0),
        }
        return {
            "step": step,
            "seed": hex16(self.seed),
            "batch": self.batch,
            "lanes": self.lanes,
            "consumed_per_lane": step * (self.batch // self.lanes),
            "consumed": self.consumed(step),
            "segments": [segment],
        }

    def check_state(self, state: Mapping[str, Any], fingerprints: Mapping[str, str] | None = None) -> None:
        """Raise UserError, with both values of all that differs, unless `state` was written by this same order."""
        now = self.state(0, fingerprints)
        try:
            segments = state["segments"]
            pairs = [(key, state[key], now[key]) for key in ("seed", "batch", "lanes")]
            pairs += [
                (
                    f"{key} of source {name!r}",
                    before.get(name, "no such source"),
                    after.get(name, "no such source"),
                )
                for key in ("fingerprints", "samples", "weights", "max_epochs")
                for before, after in [(segments[-1][key], now["segments"][0][key])]
                if before and after
                for name in sorted({*before, *after})
            ]
            pairs.append(("mixture_hash", segments[-1]["mixture_hash"], self.mixture_hash))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise UserError(
                f"the checkpoint's data position cannot be read ({error!r}); use another checkpoint"
            ) from error
        changed = [f"{what} was {before}, is now {after}" for what, before, after in pairs if before != after]
        if len(segments) != 1:
            changed.insert(0, f"segments: the checkpoint has {len(segments)}, this version of dromos reads 1")
        if changed:
            raise UserError(
                f"the data is not what the checkpoint was trained on: {'; '.join(changed)}. Restore the data and the "
                "mixture, or start a new run folder; run.accept_change, which goes on with changed data, will be "
                "supported later"
            )

    def _deal(self, step: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each row, and which draw of it: by lane, or counted over all lanes where it is interleaved."""
        segment, slots = self._segment(step)
        per_lane = self.batch // self.lanes
        if any(source.interleaved for source in self.sources):
            lane = np.arange(self.lanes)
        else:
            lane = np.unique(rows // per_lane)
        source = segment.cycle.sources(lane[:, None], slots + np.arange(per_lane))
        drawn = segment.drawn[:, lane] + segment.cycle.consumed(lane, slots)
        draw = np.zeros_like(source)
        for k, order in enumerate(self.sources):
            mine = source == k
            if order.interleaved:
                count = np.cumsum(mine.T).reshape(mine.T.shape).T + drawn[k].sum()
            else:
                count = np.cumsum(mine, axis=1) + drawn[k][:, None]
            np.copyto(draw, count - 1, where=mine)
        at = rows - lane[0] * per_lane if rows.size else rows
        return source.reshape(-1)[at], draw.reshape(-1)[at]

    def _segment(self, step: int) -> tuple[Segment, int]:
        """The segment of a step, and the slots that each lane dealt in it before that step."""
        segment = next(s for s in reversed(self.segments) if s.first_step <= step)
        return segment, (step - segment.first_step) * (self.batch // self.lanes)

    def _drawn(self, step: int) -> np.ndarray:
        segment, slots = self._segment(step)
        return segment.drawn + segment.cycle.consumed(np.arange(self.lanes), slots)

    def _plan(self) -> None:
        """Lay out the segments: at the step where a source has had its max_epochs, the others share its slots."""
        weights = list(self.weights)
        self.segments = [
            Segment(0, Cycle(weights, self.lanes), np.zeros((len(weights), self.lanes), np.int64))
        ]
        while any(weights):
            ends = {
                k: self._end(k, limit)
                for k, limit in enumerate(self._limits)
                if limit is not None and weights[k]
            }
            if not ends:
                return
            step = min(ends.values())
            for k in (k for k, end in ends.items() if end == step):
                self.ends[self.sources[k].name], weights[k] = step, 0
            if any(weights):
                self.segments.append(Segment(step, Cycle(weights, self.lanes), self._drawn(step)))
        self.last_step = step

    def _end(self, k: int, passes: Fraction) -> int:
        """First step before which source `k` has had all its passes."""
        source, first = self.sources[k], self.segments[-1].first_step
        goal = ceil(passes * source.samples / source.pieces)

        def over(step: int) -> bool:
            drawn = self._drawn(step)[k]
            return bool((drawn.sum() if source.interleaved else drawn.min()) >= goal)

        high = first + 1
        while not over(high):
            high = first + 2 * (high - first)
        return bisect_left(range(first, high), True, key=over) + first

    def _hash(self) -> str:
        sources = [
            [source.name, xxhash.xxh64_hexdigest(source.first.astype("<i8").tobytes()), weight, str(limit)]
            for source, weight, limit in zip(self.sources, self.weights, self._limits, strict=True)
        ]
        return xxhash.xxh64_hexdigest(dumps({"lanes": self.lanes, "sources": sources}).encode())


def choose_lanes(batch: int, lanes: int | None) -> int:
    """Lanes of a stream: what the recipe says if it divides the batch, else the largest divisor of it up to 1024."""
    if batch < 1:
        raise UserError(f"batch is {batch}; it must be at least 1")
    if lanes is None:
        return max(d for d in range(1, min(batch, MOST_LANES) + 1) if batch % d == 0)
    if lanes < 1 or batch % lanes:
        near = min((d for d in range(1, batch + 1) if batch % d == 0), key=lambda d: abs(d - lanes))
        raise UserError(
            f"lanes: {lanes} does not divide the batch of {batch}; the nearest number that does is {near}"
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
