"""Every way to damage one place of a JSON value: it is missing, or of another type."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

Place = tuple[str | int, ...]
OTHERS: tuple[Any, ...] = (None, "x", -1, 2.5, [1, 2], {"a": 1})


class Missing:
    """In place of a value: the place was removed."""


def damaged(value: Any, others: Sequence[Any] = OTHERS) -> Iterator[tuple[Place, Any, Any]]:
    """(place, what is there now, the damaged value) for every place below `value`: removed, or one of `others`."""
    for place in _places(value):
        *above, last = place
        without = copy.deepcopy(value)
        del at(without, above)[last]
        yield place, Missing, without
        for other in others:
            if other != at(value, place):
                changed = copy.deepcopy(value)
                at(changed, above)[last] = copy.deepcopy(other)
                yield place, other, changed


def at(value: Any, place: Sequence[str | int]) -> Any:
    """The part of a JSON value at a place."""
    for step in place:
        value = value[step]
    return value


def _places(value: Any, above: Place = ()) -> Iterator[Place]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield (*above, key)
        yield from _places(each, (*above, key))
