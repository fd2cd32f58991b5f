"""What a checkpoint keeps of a stream's history: the mixtures it was drawn from, and what that says of every draw.

A run that goes on with other data or weights opens a segment. The draws of a source whose samples are still the same
go on where they were; one whose samples changed starts a pass of its own, under epoch numbers that it has not used.
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
from data_pipeline.order.source_order import LaneLayout


@dataclass(frozen=True)
class SourceBase:
    """From which segment and epoch on a source is drawn as it is now, after how many passes (a fraction)."""

    segment: int
    first_epoch: int = 0
    passes: str = "0"


@dataclass(frozen=True)
class Segment:
    """Steps from `first_step` on, drawn from one mixture; most fields are by source.

    consumed_per_lane: samples that each lane had served before
    sources: names, in the order of the mixture, which a JSON object does not keep
    fingerprints, counts: of the source's manifest, and of its samples by shard
    base: what of the history its draws go on from
    unvisited: samples of begun epochs that the change of segment left, for sources that changed or went away
    cycles: (consumed_per_lane from which on, weights in the order of `sources`); the next where a source ends
    """

    first_step: int
    consumed_per_lane: int
    mixture_hash: str
    sources: tuple[str, ...]
    fingerprints: dict[str, str]
    samples: dict[str, int]
    counts: dict[str, str]
    weights: dict[str, int]
    max_epochs: dict[str, str]
    base: dict[str, SourceBase]
    unvisited: dict[str, int]
    cycles: tuple[tuple[int, tuple[int, ...]], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> Segment:
        """Raises KeyError, TypeError or ValueError for what is no segment."""
        base = {name: SourceBase(**one) for name, one in found["base"].items()}
        cycles = tuple((int(at), tuple(weights)) for at, weights in found["cycles"])
        lists = {"sources": tuple(found["sources"]), "base": base, "cycles": cycles}
        return Segment(**{**found, **lists})

    def same_samples(self, other: Segment, name: str) -> bool:
        """Whether a source has the samples that it has in another segment; both hold it."""
        prints = [segment.fingerprints[name] for segment in (self, other) if name in segment.fingerprints]
        return len({*prints}) <= 1 and all(
            getattr(self, key)[name] == getattr(other, key)[name] for key in ("samples", "counts")
        )

    def drawn(self, end: int, lanes: int) -> dict[str, np.ndarray]:
        """Draws of each source, int64 [lanes], from here to where each lane has served `end` samples."""
        total = np.zeros((len(self.sources), lanes), np.int64)
        stops = [*(at for at, _ in self.cycles[1:]), end]
        for (at, weights), stop in zip(self.cycles, stops, strict=True):
            if min(stop, end) > at:
                total += Cycle(weights, lanes).consumed(np.arange(lanes), min(stop, end) - at)
        return dict(zip(self.sources, total, strict=True))


class History(NamedTuple):
    """Segments that are over, with the draws of each source in each of them, int64 [lanes]."""

    segments: tuple[Segment, ...]
    drawn: tuple[dict[str, np.ndarray], ...]

    @staticmethod
    def of(segments: Sequence[Segment], end: int, lanes: int) -> History:
        """`end`: samples that each lane has served at the end of the last one."""
        ends = [*(segment.consumed_per_lane for segment in segments[1:]), end]
        drawn = (segment.drawn(stop, lanes) for segment, stop in zip(segments, ends, strict=True))
        return History(tuple(segments), tuple(drawn))

    def since(self, name: str, segment: int, lanes: int) -> np.ndarray:
        """Draws of a source, int64 [lanes], from a segment on."""
        zero = np.zeros(lanes, np.int64)
        return sum((found[name] for found in self.drawn[segment:] if name in found), zero)

    def totals(self) -> dict[str, int]:
        """Samples that each source gave."""
        names = dict.fromkeys(name for found in self.drawn for name in found)
        return {name: sum(int(found[name].sum()) for found in self.drawn if name in found) for name in names}


def open_segment(history: History, now: Segment, lanes: int) -> Segment:
    """`now`, which is opened after `history`, with the base of each of its sources and what is left unvisited."""
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
    """What a change of segment leaves behind, in words."""
    lines = []
    for name, left in segment.unvisited.items():
        if name in segment.sources:
            epoch = segment.base[name].first_epoch
            lines.append(
                f"source {name!r}: {left} samples of the epochs it had begun are left unvisited; its new samples "
                f"begin with epoch {epoch}"
            )
        else:
            lines.append(f"source {name!r}: leaves with {left} samples of its begun epochs unvisited")
    return lines


class Resumed(NamedTuple):
    """How a stream goes on: the segments to make its order with, and what was accepted and is left, in words."""

    segments: tuple[Segment, ...]
    changes: list[str]


def resume_segments(
    state: Mapping[str, Any], now: Segment, seed: str, lanes: int, batches: BatchSchedule, accept_change: bool
) -> Resumed:
    """The segments with which a stream of the mixture `now` goes on after `state`; see StreamOrder.resume."""
    try:
        before = tuple(Segment.from_json(one) for one in state["segments"])
        step, served = int(state["step"]), int(state["consumed_per_lane"])
        fixed = [("seed", state["seed"], seed), ("lanes", state["lanes"], lanes)]
        free = [("batch", state["batch"], batches.to_json()), *_compared_values(before[-1], now)]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f"the checkpoint's data position cannot be read ({error!r}): another version of dromos wrote it, or it is "
            "damaged. Go on with that version or from another checkpoint, or take the weights alone into a new run"
        ) from error
    kept, changed = (
        [f"{what} was {old}, is now {new}" for what, old, new in pairs if old != new]
        for pairs in (fixed, free)
    )
    if kept and accept_change:
        raise UserError(
            f"{'; '.join(kept)}: neither seed nor lanes of a stream can change while it runs. Restore them "
            "(lanes can be written beside a new batch), or start a new run folder"
        )
    if kept or (changed and not accept_change):
        raise UserError(
            f"the data is not what the checkpoint was trained on: {'; '.join(kept + changed)}. Restore the data "
            "and the mixture, or go on with what is there now (run.accept_change=true; in Python, "
            "resume(state, accept_change=True)), or start a new run folder"
        )
    if not changed:
        return Resumed(before if len(before) > 1 else (), [])
    history = History.of(before, served, lanes)
    opened = open_segment(history, replace(now, first_step=step, consumed_per_lane=served), lanes)
    return Resumed((*before, opened), changed + change_notes(opened))


def _compared_values(before: Segment, now: Segment) -> list[tuple[str, Any, Any]]:
    """What may differ between two mixtures, with both values, equal or not."""
    found = [
        (f"{key} of source {name!r}", old.get(name, "no such source"), new.get(name, "no such source"))
        for key in ("samples", "fingerprints", "weights", "max_epochs")
        for old, new in [(getattr(before, key), getattr(now, key))]
        if old and new
        for name in sorted({*old, *new})
        if key == "samples" or name in (old.keys() & new.keys())
    ]
    return [*found, ("mixture_hash", before.mixture_hash, now.mixture_hash)]
