"""Checks an order state as a checkpoint holds it: damage is an error that names the field, before anything uses it."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.order.batch_schedule import BatchSchedule
from data_pipeline.order.mixture_weights import MAX_CYCLE_SLOTS

# No count of a run is larger; sums and products of counts below it stay within int64.
LARGEST_COUNT = 2**53
SEGMENT_FIELDS = {
    "first_step", "consumed_per_lane", "mixture_hash", "sources", "fingerprints", "samples", "counts", "weights",
    "max_epochs", "base", "unvisited", "cycles",
}  # fmt: skip


def check_state(state: Any) -> None:
    """Raise UserError if `state` is nothing that `StreamOrder.state` writes, such as a field of another type."""
    try:
        _check_state(state)
    except ValueError as error:  # also the UserError of a batch
        raise UserError(
            f"the checkpoint's data position cannot be read ({error}): another version of dromos wrote it, or it is "
            "damaged. Resume with that version or from another checkpoint, or start a new run from the weights alone"
        ) from None


def _check_state(state: Any) -> None:
    step = _count(_get(state, "step"), "step")
    served = _count(_get(state, "consumed_per_lane"), "consumed_per_lane")
    _count(_get(state, "lanes"), "lanes", least=1)
    seed = _get(state, "seed")
    if not isinstance(seed, str) or not re.fullmatch("[0-9a-f]{16}", seed):
        raise _wrong("seed", seed, "16 hex digits")
    BatchSchedule.of(_get(state, "batch"))
    segments = _list(_get(state, "segments"), "segments")
    if not segments:
        raise _wrong("segments", segments, "a list with a segment")
    for number, segment in enumerate(segments):
        _check_segment(segment, number)
    for key, end in (("first_step", step), ("consumed_per_lane", served)):
        begins = [segment[key] for segment in segments]
        if begins[0] != 0 or any(a > b for a, b in pairwise([*begins, end])):
            raise ValueError(f"{key} of the segments is {begins}, which do not ascend from 0 to {end}")


def _check_segment(segment: Any, number: int) -> None:
    at = f"segments[{number}]"
    found = _mapping(segment, at)
    if odd := sorted(SEGMENT_FIELDS ^ set(found)):
        raise ValueError(f"{at}.{odd[0]} is {'missing' if odd[0] in SEGMENT_FIELDS else 'unknown'}")
    _count(found["first_step"], f"{at}.first_step")
    _text(found["mixture_hash"], f"{at}.mixture_hash")
    sources = [_text(name, f"{at}.sources") for name in _list(found["sources"], f"{at}.sources")]
    if not sources or len({*sources}) < len(sources):
        raise _wrong(f"{at}.sources", sources, "a list of different names")
    for key, whole in (("samples", 1), ("weights", 0), ("unvisited", 0)):
        for name, value in _mapping(found[key], f"{at}.{key}").items():
            _count(value, f"{at}.{key}.{name}", least=whole)
    for key in ("fingerprints", "counts", "max_epochs"):
        for name, value in _mapping(found[key], f"{at}.{key}").items():
            _text(value, f"{at}.{key}.{name}")
    for name, base in _mapping(found["base"], f"{at}.base").items():
        _check_base(base, number, f"{at}.base.{name}")
    for key in ("samples", "weights", "counts", "max_epochs", "base"):
        if found[key].keys() != {*sources}:
            raise ValueError(f"{at}.{key} has the sources {', '.join(found[key])}, not {', '.join(sources)}")
    _check_cycles(found, len(sources), at)


def _check_base(base: Any, number: int, at: str) -> None:
    if {*_mapping(base, at)} != {"segment", "first_epoch", "passes"}:
        raise _wrong(at, base, "an object with segment, first_epoch and passes")
    if _count(base["segment"], f"{at}.segment") > number:
        raise _wrong(f"{at}.segment", base["segment"], f"at most {number}")
    _count(base["first_epoch"], f"{at}.first_epoch")
    try:
        passes = Fraction(_text(base["passes"], f"{at}.passes"))
    except (ValueError, ZeroDivisionError):
        raise _wrong(f"{at}.passes", base["passes"], "a fraction") from None
    if passes < 0:
        raise _wrong(f"{at}.passes", base["passes"], "at least 0")


def _check_cycles(segment: Mapping[str, Any], sources: int, at: str) -> None:
    begins = [_count(segment["consumed_per_lane"], f"{at}.consumed_per_lane")]
    for number, cycle in enumerate(_list(segment["cycles"], f"{at}.cycles")):
        name = f"{at}.cycles[{number}]"
        if len(_list(cycle, name)) != 2:
            raise _wrong(name, cycle, "a number of samples and a list of weights")
        begins.append(_count(cycle[0], name))
        weights = [_count(weight, name) for weight in _list(cycle[1], name)]
        if len(weights) != sources or not 0 < sum(weights) <= MAX_CYCLE_SLOTS:
            raise _wrong(name, weights, f"{sources} weights with a sum from 1 to {MAX_CYCLE_SLOTS}")
    if len(begins) < 2 or begins[0] != begins[1] or any(a > b for a, b in pairwise(begins)):
        raise ValueError(f"{at}.cycles begin at {begins[1:]}, not at {begins[0]} and ascending")


def _get(state: Any, key: str) -> Any:
    if key not in _mapping(state, "it"):
        raise ValueError(f"{key} is missing")
    return state[key]


def _count(value: Any, name: str, least: int = 0) -> int:
    if type(value) is not int or not least <= value < LARGEST_COUNT:
        raise _wrong(name, value, f"a whole number of at least {least}")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _wrong(name, value, "text")
    return value


def _list(value: Any, name: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(name, value, "a list")
    return value


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _wrong(name, value, "an object")
    return value


def _wrong(name: str, value: Any, what: str) -> ValueError:
    return ValueError(f"{name} is {reprlib.repr(value)}, not {what}")
