"""What a check of a merge's output found, for people and for programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["wrong", "note", "good"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `wrong` decides; `note` is worth knowing."""

    level: Level
    text: str


@dataclass
class Report:
    """What `verify` found.

    not_finite: name -> (NaNs, infinities) of tensors that have any.
    inputs:     (address, unchanged | changed | gone | not reached).
    recomputed: chunks that were computed again.
    """

    folder: str
    findings: list[Finding] = field(default_factory=list)
    not_finite: dict[str, tuple[int, int]] = field(default_factory=dict)
    inputs: list[tuple[str, str]] = field(default_factory=list)
    recomputed: int = 0

    @property
    def wrong(self) -> bool:
        return any(finding.level == "wrong" for finding in self.findings)

    def add(self, level: Level, text: str) -> None:
        self.findings.append(Finding(level, text))

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "folder": self.folder,
            "wrong": self.wrong,
            "findings": [{"level": f.level, "text": f.text} for f in self.findings],
            "not_finite": {n: {"nan": nan, "inf": inf} for n, (nan, inf) in self.not_finite.items()},
            "inputs": [{"address": address, "state": state} for address, state in self.inputs],
            "recomputed": self.recomputed,
        }

    def lines(self) -> list[str]:
        """For people: what is wrong first."""
        marks = {"wrong": "WRONG  ", "note": "note   ", "good": "ok     "}
        order = ("wrong", "note", "good")
        listed = sorted(self.findings, key=lambda finding: order.index(finding.level))
        verdict = "something is wrong" if self.wrong else "nothing is wrong"
        return [*(marks[f.level] + f.text for f in listed), f"{self.folder}: {verdict}"]
