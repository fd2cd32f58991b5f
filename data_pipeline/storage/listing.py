"""Lists of names in messages: names that differ only in their numbers are folded, and the rest is counted."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_LISTED = 10
MAX_NAME = 120  # characters


def listed(names: Iterable[str], limit: int = MAX_LISTED) -> str:
    """`a.tar.gz, 00000.tgz to 00041.tgz (42) and 3 more`: at most `limit` groups of names."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    shown = [_group(group) for group in list(groups.values())[:limit]]
    rest = sum(len(group) for group in list(groups.values())[limit:])
    return ", ".join(shown) + (f" and {rest:,} more" if rest else "")


def _group(names: list[str]) -> str:
    if len(names) <= 2:
        return ", ".join(map(_short, names))
    return f"{_short(names[0])} to {_short(names[-1])} ({len(names):,})"


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 3]}..."
