"""Running statistics over the records of one format: missing values, repeats, lengths, and the first examples."""

from __future__ import annotations

from collections import Counter
from typing import Any

from data_pipeline.formats.cc3m import is_swapped
from data_pipeline.formats.img2dataset import Outcome, OutcomeCounts
from data_pipeline.formats.instructions import Conversation
from data_pipeline.formats.laion import Pair
from data_pipeline.formats.paligemma import Prompted
from data_pipeline.show.source_report import SourceReport, format_share, shorten

MAX_KEY = 300  # characters shown of a key
MAX_TURN = 4000  # characters shown of a turn
LISTED_FAILURES = 8  # failure reasons listed by name; the others are summed


class RecordStatistics:
    """Base class. The caller passes each usable record to `add`, then calls `finish`.

    `examined` counts all records and is increased by the caller; `usable` counts the records passed to `add`.
    """

    def __init__(self, report: SourceReport, max_examples: int) -> None:
        self.report = report
        self.max_examples = max_examples
        self.examined = 0
        self.usable = 0
        self.missing: Counter[str] = Counter()
        self.repeats = 0
        self._value_hashes: set[int] = set()

    def add(self, record: Any) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        """Write the notes and problems that follow from the statistics into the report."""

    def missing_share(self, meaning: str | None) -> float | None:
        """Return the share of records without a value of this meaning; None if it was not counted."""
        return None

    def add_example(self, key: str, caption: str, **more: Any) -> None:
        if len(self.report.about["first"]) < self.max_examples:
            self.report.about["first"].append({"key": key[:MAX_KEY], "caption": caption, **more})

    def count_repeat(self, value: str) -> None:
        """Count a value that occurred before. Only hashes are kept: the URLs themselves would take too much memory."""
        value_hash = hash(value)
        self.repeats += value_hash in self._value_hashes
        self._value_hashes.add(value_hash)

    def add_word_count(self, text: str) -> None:
        self.report.series["words"].append(len(text.split()))

    def note_repeats(self, repeated: str) -> None:
        if self.repeats:
            self.report.notes.append(
                f"{format_share(self.repeats, self.usable)} records examined repeat {repeated}"
            )


class PairStatistics(RecordStatistics):
    """Tables and lines of image URLs with captions."""

    NUMBERS = ("similarity", "punsafe", "pwatermark", "aesthetic")
    FIELDS = ("width", "height", *NUMBERS, "nsfw", "license", "language", "hash", "md5", "id")
    ORDER_CHECKED = 200  # pairs examined for swapped columns

    def __init__(self, report: SourceReport, max_examples: int) -> None:
        super().__init__(report, max_examples)
        self.first_pairs: list[Pair] = []

    def add(self, pair: Pair) -> None:
        self.usable += 1
        self.count_repeat(pair.url)
        # LAION-COCO lists generated captions beside the original alt text.
        generated = self.report.form.name == "laion-coco"
        self.missing["caption"] += not (pair.alt_text if generated else pair.captions)
        self.missing["captions"] += not pair.captions
        for name in self.FIELDS:
            value = getattr(pair, name)
            self.missing[name] += value is None
            if value is not None and name in self.NUMBERS:
                self.report.series[name].append(value)
        if pair.width and pair.height:
            self.report.series["width"].append(pair.width)
            self.report.series["height"].append(pair.height)
        if pair.captions:
            self.add_word_count(pair.captions[0])
        if len(self.first_pairs) < self.ORDER_CHECKED:
            self.first_pairs.append(pair)
        self.add_example(key=pair.url, caption=shorten(pair.captions[0] if pair.captions else ""))

    def missing_share(self, meaning: str | None) -> float | None:
        if meaning is None or not self.usable:
            return None
        if meaning == "url":
            return (self.examined - self.usable) / self.examined
        name = {"top caption": "captions", "caption scores": "captions"}.get(meaning, meaning)
        return self.missing[name] / self.usable if name in self.missing else None

    def finish(self) -> None:
        if is_swapped(self.first_pairs):
            self.report.problems.append(
                "the first column holds URLs or paths and the second holds text; CC3M's order is caption, tab, URL: "
                "swap the columns, or write a header such as filepath, tab, title (open_clip's)"
            )
        empty = self.missing["captions"]
        if empty and empty == self.usable:
            self.report.problems.append(f"none of {self.usable:,} records examined has a caption")
        elif empty:
            self.report.notes.append(f"{format_share(empty, self.usable)} records examined have no caption")
        meanings = {column["meaning"] for column in self.report.about.get("columns", [])}
        for name in ("width", "height", *self.NUMBERS):
            if name in meanings and self.missing[name]:
                self.report.notes.append(
                    f"{format_share(self.missing[name], self.usable)} records examined have no {name}"
                )
        self.note_repeats("a URL")


class OutcomeStatistics(RecordStatistics):
    """img2dataset's parquet files without their tars."""

    def __init__(self, report: SourceReport, max_examples: int) -> None:
        super().__init__(report, max_examples)
        self.sums = OutcomeCounts()

    def add(self, outcome: Outcome) -> None:
        self.usable += 1
        self.sums.add(outcome)
        self.count_repeat(outcome.key)
        self.missing["caption"] += not (outcome.caption or "").strip()
        if outcome.succeeded and outcome.caption:
            self.add_word_count(outcome.caption)
        if outcome.width and outcome.height:
            self.report.series["width"].append(outcome.width)
            self.report.series["height"].append(outcome.height)
        self.add_example(key=outcome.key, caption=shorten(outcome.caption or ""), status=outcome.status)

    def missing_share(self, meaning: str | None) -> float | None:
        return self.missing["caption"] / self.usable if meaning == "caption" and self.usable else None

    def finish(self) -> None:
        failures = self.sums.failures.most_common()
        self.report.about["rows"] = {
            "shards": self.report.about["examined"]["shards"],
            "rows": self.sums.rows,
            "successes": self.sums.successes,
            "failures": dict(failures[:LISTED_FAILURES]),
            "other_failures": sum(count for _, count in failures[LISTED_FAILURES:]),
        }
        self.note_repeats("a key: two img2dataset runs both number their samples from 0")


class DocumentStatistics(RecordStatistics):
    """Web pages as (url, text)."""

    def add(self, document: tuple[str, str]) -> None:
        url, text = document
        self.usable += 1
        self.missing["url"] += not url
        self.missing["text"] += not text.strip()
        if url:
            self.count_repeat(url)
        if text.strip():
            self.add_word_count(text)
        self.add_example(key=url, caption=shorten(text))
        if len(self.report.first_documents) < self.max_examples and text.strip():
            self.report.first_documents.append((url, text))

    def missing_share(self, meaning: str | None) -> float | None:
        return self.missing[meaning] / self.usable if meaning in ("url", "text") and self.usable else None

    def finish(self) -> None:
        empty = self.missing["text"]
        if empty and empty == self.usable:
            self.report.problems.append(f"none of {self.usable:,} documents examined has a text")
        elif empty:
            self.report.notes.append(f"{format_share(empty, self.usable)} documents examined have no text")
        self.note_repeats("a URL")


class PictureStatistics(RecordStatistics):
    """Base class of records that name image files. `image_paths` holds the first MAX_PATHS of them."""

    MAX_PATHS = 64

    def __init__(self, report: SourceReport, max_examples: int) -> None:
        super().__init__(report, max_examples)
        self.image_paths: list[str] = []

    def add_image_paths(self, *paths: str) -> None:
        self.missing["pictures"] += not paths
        self.image_paths += paths[: self.MAX_PATHS - len(self.image_paths)]


class ConversationStatistics(PictureStatistics):
    """Conversations (place, record), with or without images."""

    def add(self, entry: tuple[str, Conversation]) -> None:
        place, record = entry
        self.usable += 1
        self.add_image_paths(*record.images)
        self.missing["id"] += record.id is None
        if record.id is not None:
            self.count_repeat(record.id)
        self.report.series["turns"].append(len(record.turns))
        for turn in record.turns:
            if turn.role == "assistant":
                self.add_word_count(turn.text)
        self.add_example(
            key=record.id if record.id is not None else place,
            caption=shorten(" ".join(f"{turn.role}: {turn.text}" for turn in record.turns)),
            images=list(record.images),
            turns=[{"role": turn.role, "text": turn.text[:MAX_TURN]} for turn in record.turns],
        )

    def finish(self) -> None:
        self.report.about["without_pictures"] = self.missing["pictures"]
        if self.missing["id"]:
            self.report.notes.append(
                f"{format_share(self.missing['id'], self.usable)} records examined have no id"
            )
        self.note_repeats("an id")


class PromptedStatistics(PictureStatistics):
    """PaliGemma's examples (place, record): image, prefix, suffix."""

    def add(self, entry: tuple[str, Prompted]) -> None:
        place, record = entry
        self.usable += 1
        self.add_image_paths(*([record.image] if record.image else []))
        self.missing["suffix"] += record.suffix is None
        self.add_word_count(record.suffix or "")
        turns = [{"role": "user", "text": record.prefix[:MAX_TURN]}]
        if record.suffix is not None:
            turns.append({"role": "assistant", "text": record.suffix[:MAX_TURN]})
        self.add_example(
            key=place,
            caption=shorten(f"{record.prefix} → {record.suffix if record.suffix is not None else '?'}"),
            images=[record.image] if record.image else [],
            turns=turns,
        )

    def finish(self) -> None:
        self.report.about["without_pictures"] = self.missing["pictures"]
        if self.missing["suffix"]:
            self.report.notes.append(
                f"{format_share(self.missing['suffix'], self.usable)} records examined have no suffix, "
                "so they have no training target"
            )


# Family of a format -> its statistics.
STATISTICS: dict[str, type[RecordStatistics]] = {
    "pairs": PairStatistics,
    "lines": PairStatistics,
    "outcomes": OutcomeStatistics,
    "documents": DocumentStatistics,
    "conversations": ConversationStatistics,
    "prompted": PromptedStatistics,
}
