"""Checks of keys and digests: every ingredient changes them, and so does a boundary that moves between two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from typing import Any


def assert_each_changes(
    key: Callable[..., Any], base: Mapping[str, Any], others: Mapping[str, Any] | Iterable[tuple[str, Any]]
) -> None:
    """Assert that `key(**base)` is repeatable, and that each of `others`, one ingredient changed, gives another key."""
    pairs = list(others.items() if isinstance(others, Mapping) else others)
    assert {name for name, _ in pairs} >= set(base), "an ingredient is not changed"
    keys = [
        ("base", key(**base)),
        *((f"{name}={value!r}", key(**{**base, name: value})) for name, value in pairs),
    ]
    assert key(**base) == keys[0][1]
    assert_distinct(keys)


def assert_distinct(keys: Iterable[tuple[str, Any]]) -> None:
    """Assert that no two of the (name, key) pairs have the same key."""
    same = [(a, b) for (a, one), (b, other) in combinations(list(keys), 2) if one == other]
    assert same == []
