"""Order state in a checkpoint, and how a run resumes from it, also with changed data.

The state is a list of segments, one for each mixture used so far. A run that continues with other data or mixture
weights opens a new segment. A source with unchanged samples continues its draws. A source with changed samples starts a
new pass, with epoch numbers that it has not used before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.order.batch_schedule import BatchSchedule
from data_pipeline.order.mixture import Cycle
from data_pipeline.order.saved_state import check_state
from data_pipeline.order.source_order import LaneLayout


@dataclass(frozen=True)
class SourceBase:
    """Where the current version of a source's samples starts.

    segment: number of the first segment with these samples
    first_epoch: epoch number of their first pass
    passes: passes over earlier versions of the samples, as the text of a fraction; they count towards max_epochs
    """

    segment: int
    first_epoch: int = 0
    passes: str = "0"


@dataclass(frozen=True)
class Segment:
    """Steps from `first_step` on that are drawn from one mixture; dictionaries are by source name.

    consumed_per_lane: samples that each lane had served before this segment
    sources: names in the order of the mixture; a list, because JSON objects have no order
    fingerprints: of the sources' manifests; count_hashes (`counts` in JSON): hashes of their samples by shard
    base: start of each source's current samples
    unvisited: samples of unfinished epochs that will never be read, for sources that changed or were removed
    cycles: (consumed_per_lane at which it starts, weights in the order of `sources`); a new one starts when a source
        ends
    """

    first_step: int
    consumed_per_lane: int
    mixture_hash: str
    sources: tuple[str, ...]
    fingerprints: dict[str, str]
    samples: dict[str, int]
    count_hashes: dict[str, str]
    weights: dict[str, int]
    max_epochs: dict[str, str]
    base: dict[str, SourceBase]
    unvisited: dict[str, int]
    cycles: tuple[tuple[int, tuple[int, ...]], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All fields as a JSON object."""
        return {"counts" if key == "count_hashes" else key: value for key, value in asdict(self).items()}

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> Segment:
        """Inverse of `to_json`, for a state that has passed `check_state`."""
        base = {name: SourceBase(**base_fields) for name, base_fields in fields["base"].items()}
        cycles = tuple((at, tuple(weights)) for at, weights in fields["cycles"])
        values = {key: value for key, value in fields.items() if key != "counts"}
        values |= {"count_hashes": fields["counts"], "sources": tuple(fields["sources"])}
        return Segment(**{**values, "base": base, "cycles": cycles})

    def same_samples(self, other: Segment, name: str) -> bool:
        """True if the source `name` has the same samples in both segments; both must contain it."""
        prints = [segment.fingerprints[name] for segment in (self, other) if name in segment.fingerprints]
        return len({*prints}) <= 1 and all(
            getattr(self, key)[name] == getattr(other, key)[name] for key in ("samples", "count_hashes")
        )

    def drawn(self, end: int, lanes: int) -> dict[str, np.ndarray]:
        """Draws of each source, int64 [lanes], from this segment's start until every lane has served `end`."""
        total = np.zeros((len(self.sources), lanes), np.int64)
        stops = [*(at for at, _ in self.cycles[1:]), end]
        for (at, weights), stop in zip(self.cycles, stops, strict=True):
            if min(stop, end) > at:
                total += Cycle(weights, lanes).consumed(np.arange(lanes), min(stop, end) - at)
        return dict(zip(self.sources, total, strict=True))


class History(NamedTuple):
    """Finished segments, and for each of them the draws of each source, int64 [lanes]."""

    segments: tuple[Segment, ...]
    drawn: tuple[dict[str, np.ndarray], ...]

    @staticmethod
    def of(segments: Sequence[Segment], end: int, lanes: int) -> History:
        """History of `segments`; `end` is the number of samples that each lane served until the last one ended."""
        ends = [*(segment.consumed_per_lane for segment in segments[1:]), end]
        drawn = (segment.drawn(stop, lanes) for segment, stop in zip(segments, ends, strict=True))
        return History(tuple(segments), tuple(drawn))

    def since(self, name: str, segment: int, lanes: int) -> np.ndarray:
        """Draws of a source, int64 [lanes], from the segment of this number on."""
        zero = np.zeros(lanes, np.int64)
        return sum((found[name] for found in self.drawn[segment:] if name in found), zero)

    def totals(self) -> dict[str, int]:
        """Samples drawn from each source."""
        names = dict.fromkeys(name for found in self.drawn for name in found)
        return {name: sum(int(found[name].sum()) for found in self.drawn if name in found) for name in names}


def open_segment(history: History, now: Segment, lanes: int) -> Segment:
    """`now` as the segment after `history`, with `base` and `unvisited` filled in."""
    base: dict[str, SourceBase] = {}
    unvisited: dict[str, int] = {}
    last = history.segments[-1]
    for name in dict.fromkeys((*now.sources, *last.sources)):
        known = next((old for old in reversed(history.segments) if name in old.sources), None)
        if known is None:
            base[name] = SourceBase(len(history.segments))
            continue
        before = known.base[name]
        if name in now.sources and now.same_samples(known, name):
            base[name] = before
            continue
        drawn = history.since(name, before.segment, lanes)
        epochs, left = LaneLayout(known.samples[name], lanes).begun_epochs(drawn)
        if name in last.sources:
            unvisited[name] = left
        if name in now.sources:
            passes = Fraction(before.passes) + Fraction(int(drawn.sum()), known.samples[name])
            base[name] = SourceBase(len(history.segments), before.first_epoch + epochs, str(passes))
    return replace(now, base=base, unvisited=unvisited)


def change_notes(segment: Segment) -> list[str]:
    """One line for each source with unfinished epochs that the change to `segment` ends."""
    lines = []
    for name, left in segment.unvisited.items():
        if name in segment.sources:
            epoch = segment.base[name].first_epoch
            lines.append(
                f"source {name!r}: {left} samples of unfinished epochs will not be used; the new data starts at epoch "
                f"{epoch}"
            )
        else:
            lines.append(f"source {name!r}: removed; {left} samples of unfinished epochs will not be used")
    return lines


class ResumeResult(NamedTuple):
    """Result of a resume.

    segments: the segments of the resumed StreamOrder; empty if nothing changed since the start of the run
    changes: one line for each accepted change, and for each source with samples that will not be used
    """

    segments: tuple[Segment, ...]
    changes: list[str]


def resume_segments(
    state: Mapping[str, Any], now: Segment, seed: str, lanes: int, batches: BatchSchedule, accept_change: bool
) -> ResumeResult:
    """Segments with which a stream of mixture `now` continues after `state`; see StreamOrder.resume."""
    check_state(state)
    before = tuple(Segment.from_json(fields) for fields in state["segments"])
    step, served = state["step"], state["consumed_per_lane"]
    fixed = [("seed", state["seed"], seed), ("lanes", state["lanes"], lanes)]
    free = [("batch", state["batch"], batches.to_json()), *_compared_values(before[-1], now)]
    fixed_changes, free_changes = (
        [f"{key} changed from {old} to {new}" for key, old, new in values if old != new]
        for values in (fixed, free)
    )
    if fixed_changes and accept_change:
        raise UserError(
            f"{'; '.join(fixed_changes)}: the seed and the lanes of a stream cannot change during a run. Restore them "
            "(if only the batch changed, set `lanes` to its old value), or start a new run folder"
        )
    if fixed_changes or (free_changes and not accept_change):
        raise UserError(
            f"the data differs from the data of the checkpoint: {'; '.join(fixed_changes + free_changes)}. Restore the "
            "data and the mixture, or continue with the current data (run.accept_change=true; in Python, "
            "resume(state, accept_change=True)), or start a new run folder"
        )
    if not free_changes:
        return ResumeResult(before if len(before) > 1 else (), [])
    history = History.of(before, served, lanes)
    opened = open_segment(history, replace(now, first_step=step, consumed_per_lane=served), lanes)
    return ResumeResult((*before, opened), free_changes + change_notes(opened))


def _compared_values(before: Segment, now: Segment) -> list[tuple[str, Any, Any]]:
    """(name, old value, new value) of everything that may differ between two mixtures, equal values included."""
    found = [
        (f"{key} of source {name!r}", old.get(name, "no such source"), new.get(name, "no such source"))
        for key in ("samples", "fingerprints", "weights", "max_epochs")
        for old, new in [(getattr(before, key), getattr(now, key))]
        if old and new
        for name in sorted({*old, *new})
        if key == "samples" or name in (old.keys() & new.keys())
    ]
    return [*found, ("mixture_hash", before.mixture_hash, now.mixture_hash)]
