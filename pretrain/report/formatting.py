"""Numbers, counts and times as the report writes them."""

from __future__ import annotations

from typing import Any


def number(value: float) -> str:
    """Format integers with thousands separators, other numbers with four significant digits."""
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def plural(count: Any, word: str) -> str:
    return f"{number(count) if isinstance(count, int) else count} {word}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Format seconds: 96 becomes "1 min 36 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
