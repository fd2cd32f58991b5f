"""What was found out about a source: a dict for people and programs, and the figures that a page draws."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.formats import Format
from data_pipeline.formats.records import BadRecord
from data_pipeline.sources.tar import Sample

LONGEST = 200  # characters of a caption or document that are shown
EXAMPLES = 3  # bad records shown of each reason
EXAMINE = 16  # files that are looked into
FIRST = 5  # records that are shown


@dataclass
class SourceReport:
    """`about` is plain and JSON-able; `series` holds one list of figures a name, for what was examined, and
    `passages` the first documents, (address, text), whole; `tables` the samples of each tar examined.

    About always has: path, format (a slug), kind (words), shards (files), samples (None if unknown), bytes,
    counted_by, first (records), notes (worth knowing) and problems (wrong); the rest depends on the format.
    """

    form: Format
    about: dict[str, Any]
    series: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    passages: list[tuple[str, str]] = field(default_factory=list)
    tables: dict[str, list[Sample]] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        problems: list[str] = self.about["problems"]
        return problems

    @property
    def notes(self) -> list[str]:
        notes: list[str] = self.about["notes"]
        return notes


@dataclass
class Bad:
    """Verdicts counted by reason, with the first examples of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, str]] = field(default_factory=list)

    def add(self, verdict: BadRecord) -> None:
        self.counts[verdict.reason] += 1
        if self.counts[verdict.reason] <= EXAMPLES:
            self.examples.append(
                {
                    "where": verdict.where,
                    "place": verdict.place,
                    "reason": verdict.reason,
                    "detail": verdict.detail[:LONGEST],
                }
            )


def spread(files: tuple[str, ...] | list[str], number: int) -> list[str]:
    """At most `number` of them, evenly spaced, the first among them."""
    return list(files[:: max(1, -(-len(files) // max(number, 1)))])


def share(part: int, whole: int) -> str:
    """ "12 of 400 (3.0 %)" """
    percent = 100 * part / whole if whole else 0.0
    digits = 0 if percent in (0, 100) else 1 if percent >= 0.1 else 3
    return f"{part:,} of {whole:,} ({percent:.{digits}f} %)"


def clip(text: str) -> str:
    """A text on one line, as much of it as is shown."""
    return " ".join(text[: 2 * LONGEST].split())[:LONGEST]
