"""`SourceReport`: the findings about a source, as a JSON-able dict and as series of values for plots."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.formats import Format
from data_pipeline.formats.records import BadRecord
from data_pipeline.sources.tar import Sample

MAX_TEXT = 200  # characters shown of a caption or document
EXAMPLES_PER_REASON = 3  # bad records listed for each reason
EXAMINED_FILES = 16
SHOWN_RECORDS = 5


@dataclass(frozen=True)
class Measurements:
    """One value per decoded sample: pixels, bytes of the image file, words of the caption, and the caption."""

    width: list[float] = field(default_factory=list)
    height: list[float] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)
    words: list[float] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)


@dataclass
class DecodedSamples:
    """Samples that were decoded as in training: how many, their measurements, and the unusable ones.

    pictured: (tar, sample) of those whose image could be decoded
    """

    examined: int = 0
    pictured: list[tuple[str, Sample]] = field(default_factory=list)
    measurements: Measurements = field(default_factory=Measurements)
    bad: list[BadRecord] = field(default_factory=list)


@dataclass
class SourceReport:
    """The findings about a source. Inspectors fill it in; the terminal and the HTML page display it.

    `about` is JSON-able and always has: path, format (a slug), kind (its title), shards (number of files), samples
    (None if unknown), bytes, counted_by, first (records), notes (unusual, usable) and problems (to be fixed). Its
    other keys depend on the format. `series` maps the name of a measurement to one value per examined record.
    `first_documents` holds the first documents in full, as (url, text). `tables` maps each examined tar to its samples;
    `decoded` holds those that were decoded.
    """

    form: Format
    about: dict[str, Any]
    series: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    first_documents: list[tuple[str, str]] = field(default_factory=list)
    tables: dict[str, list[Sample]] = field(default_factory=dict)
    decoded: DecodedSamples | None = None

    @property
    def problems(self) -> list[str]:
        problems: list[str] = self.about["problems"]
        return problems

    @property
    def notes(self) -> list[str]:
        notes: list[str] = self.about["notes"]
        return notes


@dataclass
class BadRecordCounts:
    """Bad records counted by reason, with the first examples of each reason."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, str]] = field(default_factory=list)

    def add(self, record: BadRecord) -> None:
        self.counts[record.reason] += 1
        if self.counts[record.reason] <= EXAMPLES_PER_REASON:
            self.examples.append(
                {
                    "where": record.where,
                    "place": record.place,
                    "reason": record.reason,
                    "detail": record.detail[:MAX_TEXT],
                }
            )


def evenly_spaced(files: tuple[str, ...] | list[str], number: int) -> list[str]:
    """Return at most `number` of the files, evenly spaced, starting with the first."""
    return list(files[:: max(1, -(-len(files) // max(number, 1)))])


def format_share(part: int, whole: int) -> str:
    """Format a share, such as "12 of 400 (3.0 %)"."""
    percent = 100 * part / whole if whole else 0.0
    digits = 0 if percent in (0, 100) else 1 if percent >= 0.1 else 3
    return f"{part:,} of {whole:,} ({percent:.{digits}f} %)"


def shorten(text: str) -> str:
    """Return the first MAX_TEXT characters of a text, on one line."""
    return " ".join(text[: 2 * MAX_TEXT].split())[:MAX_TEXT]
