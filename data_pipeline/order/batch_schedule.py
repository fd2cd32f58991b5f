"""`BatchSchedule`: rows of the global batch at each step, constant or ramped up. Steps count from 0."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import gcd
from operator import index
from typing import Any

from data_pipeline.errors import UserError


def _whole_number(number: Any) -> int:
    """A step or a number of rows as int; JSON and YAML may hold it as text. Raises UserError for 8.5 or True."""
    try:
        if not isinstance(number, bool):
            return int(number) if isinstance(number, str) else index(number)
    except (TypeError, ValueError):
        pass
    raise UserError(
        f"batch: {number!r} is not a whole number; write a number of rows, or first step -> rows, as in {{0: 1024}}"
    )


@dataclass(frozen=True)
class BatchSchedule:
    """Rows of the global batch: `rows[i]` from step `first[i]` up to, not including, step `first[i + 1]`."""

    first: tuple[int, ...]
    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.first or self.first[0] != 0 or any(a >= b for a, b in pairwise(self.first)):
            raise UserError(
                f"batch: the first steps are {', '.join(map(str, self.first)) or 'missing'}; "
                "they must start at 0 and increase, as in {0: 1024, 1000: 4096}"
            )
        for rows in self.rows:
            if rows < 1:
                raise UserError(f"batch is {rows}; it must be at least 1")

    @staticmethod
    def of(batch: int | Mapping[int, int] | Mapping[str, int] | BatchSchedule) -> BatchSchedule:
        """From a number of rows, a map first step -> rows, or a schedule. Raises UserError.

        Steps may be text, as JSON writes the keys of an object.
        """
        if isinstance(batch, BatchSchedule):
            return batch
        if not isinstance(batch, Mapping):
            return BatchSchedule((0,), (_whole_number(batch),))
        by_step = {_whole_number(step): _whole_number(rows) for step, rows in batch.items()}
        if len(by_step) < len(batch):
            raise UserError(f"batch: a step appears twice in {', '.join(map(repr, batch))}; write it once")
        return BatchSchedule(tuple(sorted(by_step)), tuple(by_step[step] for step in sorted(by_step)))

    @property
    def largest(self) -> int:
        """Rows of the largest batch."""
        return max(self.rows)

    @property
    def divisor(self) -> int:
        """Greatest common divisor of all batches."""
        return gcd(*self.rows)

    def at(self, step: int) -> int:
        """Rows at `step`."""
        return self.rows[bisect_right(self.first, step) - 1]

    def before(self, step: int) -> int:
        """Total rows of all steps before `step`."""
        ends = [*self.first[1:], step]
        return sum(
            rows * max(0, min(end, step) - first)
            for first, end, rows in zip(self.first, ends, self.rows, strict=True)
        )

    def steps(self, samples: int) -> int:
        """Smallest number of steps that together have at least `samples` rows."""
        last = bisect_right([self.before(first) for first in self.first], max(0, samples)) - 1
        first, rows = self.first[last], self.rows[last]
        return first - (self.before(first) - max(0, samples)) // rows

    def to_json(self) -> int | dict[str, int]:
        """A number of rows, or first step -> rows; `of` reads both."""
        if len(self.rows) == 1:
            return self.rows[0]
        return {str(step): rows for step, rows in zip(self.first, self.rows, strict=True)}

    def __str__(self) -> str:
        if len(self.rows) == 1:
            return str(self.rows[0])
        return "{" + ", ".join(f"{a}: {b}" for a, b in zip(self.first, self.rows, strict=True)) + "}"
