"""What a reader yields in the place of a record that cannot be used: where it stands and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """`place` is "line 3" or "row 17" of the file `where`; `reason` is a short slug that is counted."""

    where: str
    place: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where}, {self.place}: {self.reason}" + (f" ({self.detail})" if self.detail else "")
