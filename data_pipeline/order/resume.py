"""Whether a stream can go on after a checkpoint's state, and with which segments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from data_pipeline.errors import UserError
from data_pipeline.order.batch_schedule import Batches
from data_pipeline.order.state import Past, Segment, follow, told


class Resumed(NamedTuple):
    """How a stream goes on: the segments to make its order with, and what was accepted and is left, in words."""

    segments: tuple[Segment, ...]
    changes: list[str]


def go_on(
    state: Mapping[str, Any], now: Segment, seed: str, lanes: int, batches: Batches, accept_change: bool
) -> Resumed:
    """The segments with which a stream of the mixture `now` goes on after `state`; see StreamOrder.resume."""
    try:
        before = tuple(Segment.from_json(one) for one in state["segments"])
        step, served = int(state["step"]), int(state["consumed_per_lane"])
        fixed = [("seed", state["seed"], seed), ("lanes", state["lanes"], lanes)]
        free = [("batch", state["batch"], batches.plain()), *_pairs(before[-1], now)]
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
    past = Past.of(before, served, lanes)
    opened = follow(past, replace(now, first_step=step, consumed_per_lane=served), lanes)
    return Resumed((*before, opened), changed + told(opened))


def _pairs(before: Segment, now: Segment) -> list[tuple[str, Any, Any]]:
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
