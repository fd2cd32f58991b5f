"""Reads bad_samples.jsonl, and counts the lines of it that are damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pretrain.run.metrics_log import read_with_damage

TEXTS = ("url", "key", "reason", "detail")


class BadSamples(NamedTuple):
    """lines: the whole lines of bad_samples.jsonl; damaged: how many others lack a text, or are no object."""

    lines: list[dict[str, Any]]
    damaged: int

    @property
    def note(self) -> str:
        """A sentence about the damaged lines; empty if there is none."""
        if not self.damaged:
            return ""
        lines = "1 line" if self.damaged == 1 else f"{self.damaged} lines"
        return f"{lines} of bad_samples.jsonl {'is' if self.damaged == 1 else 'are'} damaged and left out."


def read_bad_samples(path: Path) -> BadSamples:
    """The lines of a bad_samples.jsonl; none if the file does not exist."""
    rows, damaged = read_with_damage(path)
    lines = [row for row in rows if all(isinstance(row.get(name), str) for name in TEXTS)]
    return BadSamples(lines, len(damaged) + len(rows) - len(lines))
