"""Sums over the records of one format: what is missing, what occurs twice, how long things are, the first ones."""

from __future__ import annotations

from collections import Counter
from typing import Any

from data_pipeline.formats.cc3m import is_swapped
from data_pipeline.formats.img2dataset import Outcome, Sums
from data_pipeline.formats.instructions import Conversation
from data_pipeline.formats.laion import Pair
from data_pipeline.formats.paligemma import Prompted
from data_pipeline.show.source_report import SourceReport, clip, share

# Characters that are kept of what a record says.
LONGEST_KEY = 300
LONGEST_TURN = 4000


class RecordStatistics:
    """`add` every usable record, then `finish`; `examined` counts the unusable ones too."""

    def __init__(self, found: SourceReport, first: int) -> None:
        self.found = found
        self.first = first
        self.examined = 0
        self.used = 0
        self.absent: Counter[str] = Counter()
        self.seen: set[int] = set()
        self.twice = 0

    def add(self, record: Any) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        """Notes and problems that the sums make."""

    def missing(self, meaning: str | None) -> float | None:
        """Share of the records without a value of that meaning, None if nobody counted."""
        return None

    def show(self, key: str, caption: str, **more: Any) -> None:
        if len(self.found.about["first"]) < self.first:
            self.found.about["first"].append({"key": key[:LONGEST_KEY], "caption": caption, **more})

    def once(self, value: str) -> None:
        """Count what was there before, by its hash: the addresses themselves would be held."""
        mark = hash(value)
        self.twice += mark in self.seen
        self.seen.add(mark)

    def lengths(self, name: str, text: str) -> None:
        self.found.series[name].append(len(text.split()))

    def tell_twice(self, what: str) -> None:
        if self.twice:
            self.found.notes.append(f"{share(self.twice, self.used)} records examined repeat {what}")


class PairStatistics(RecordStatistics):
    """Tables and lines of addresses and captions."""

    NUMBERS = ("similarity", "punsafe", "pwatermark", "aesthetic")
    FIELDS = ("width", "height", *NUMBERS, "nsfw", "license", "language", "hash", "md5", "id")

    def __init__(self, found: SourceReport, first: int) -> None:
        super().__init__(found, first)
        self.sample: list[Pair] = []

    def add(self, pair: Pair) -> None:
        self.used += 1
        self.once(pair.url)
        generated = self.found.form.name == "laion-coco"
        self.absent["caption"] += not (pair.alt_text if generated else pair.captions)
        self.absent["captions"] += not pair.captions
        for name in self.FIELDS:
            value = getattr(pair, name)
            self.absent[name] += value is None
            if value is not None and name in self.NUMBERS:
                self.found.series[name].append(value)
        if pair.width and pair.height:
            self.found.series["width"].append(pair.width)
            self.found.series["height"].append(pair.height)
        if pair.captions:
            self.lengths("words", pair.captions[0])
        if len(self.sample) < 200:
            self.sample.append(pair)
        self.show(key=pair.url, caption=clip(pair.captions[0] if pair.captions else ""))

    def missing(self, meaning: str | None) -> float | None:
        if meaning is None or not self.used:
            return None
        if meaning == "url":
            return (self.examined - self.used) / self.examined
        name = {"top caption": "captions", "caption scores": "captions"}.get(meaning, meaning)
        return self.absent[name] / self.used if name in self.absent else None

    def finish(self) -> None:
        if is_swapped(self.sample):
            self.found.problems.append(
                "the first column holds addresses and the second words: CC3M's order is caption, tab, url; "
                "swap the columns"
            )
        empty = self.absent["captions"]
        if empty and empty == self.used:
            self.found.problems.append(f"none of {self.used:,} records examined has a caption")
        elif empty:
            self.found.notes.append(f"{share(empty, self.used)} records examined have no caption")
        meanings = {column["meaning"] for column in self.found.about.get("columns", [])}
        for name in ("width", "height", *self.NUMBERS):
            if name in meanings and self.absent[name]:
                self.found.notes.append(
                    f"{share(self.absent[name], self.used)} records examined have no {name}"
                )
        self.tell_twice("an address")


class OutcomeStatistics(RecordStatistics):
    """img2dataset's parquet files without their tars."""

    def __init__(self, found: SourceReport, first: int) -> None:
        super().__init__(found, first)
        self.sums = Sums()

    def add(self, outcome: Outcome) -> None:
        self.used += 1
        self.sums.add(outcome)
        self.once(outcome.key)
        self.absent["caption"] += not (outcome.caption or "").strip()
        if outcome.succeeded and outcome.caption:
            self.lengths("words", outcome.caption)
        if outcome.width and outcome.height:
            self.found.series["width"].append(outcome.width)
            self.found.series["height"].append(outcome.height)
        self.show(key=outcome.key, caption=clip(outcome.caption or ""), status=outcome.status)

    def missing(self, meaning: str | None) -> float | None:
        return self.absent["caption"] / self.used if meaning == "caption" and self.used else None

    def finish(self) -> None:
        self.found.about["rows"] = {
            "shards": self.found.about["examined"]["shards"],
            "rows": self.sums.rows,
            "successes": self.sums.successes,
            "failures": dict(self.sums.failures.most_common(8)),
            "other_failures": sum(count for _, count in self.sums.failures.most_common()[8:]),
        }
        self.tell_twice("a key: two runs of img2dataset number from 0 both")


class DocumentStatistics(RecordStatistics):
    """(url, text) of web pages."""

    def add(self, document: tuple[str, str]) -> None:
        url, text = document
        self.used += 1
        self.absent["url"] += not url
        self.absent["text"] += not text.strip()
        if url:
            self.once(url)
        if text.strip():
            self.lengths("words", text)
        self.show(key=url, caption=clip(text))
        if len(self.found.passages) < self.first and text.strip():
            self.found.passages.append((url, text))

    def missing(self, meaning: str | None) -> float | None:
        return self.absent[meaning] / self.used if meaning in ("url", "text") and self.used else None

    def finish(self) -> None:
        empty = self.absent["text"]
        if empty and empty == self.used:
            self.found.problems.append(f"none of {self.used:,} documents examined has a text")
        elif empty:
            self.found.notes.append(f"{share(empty, self.used)} documents examined have no text")
        self.tell_twice("an address")


class WithPictures(RecordStatistics):
    """Records that name pictures; `paths` holds the first of them."""

    LOOKED_FOR = 64

    def __init__(self, found: SourceReport, first: int) -> None:
        super().__init__(found, first)
        self.paths: list[str] = []

    def names(self, *paths: str) -> None:
        self.absent["pictures"] += not paths
        self.paths += paths[: self.LOOKED_FOR - len(self.paths)]


class ConversationStatistics(WithPictures):
    """Dialogues with or without pictures."""

    def add(self, entry: tuple[str, Conversation]) -> None:
        place, record = entry
        self.used += 1
        self.names(*record.images)
        self.absent["id"] += record.id is None
        if record.id is not None:
            self.once(record.id)
        self.found.series["turns"].append(len(record.turns))
        for turn in record.turns:
            if turn.role == "assistant":
                self.lengths("words", turn.text)
        self.show(
            key=record.id if record.id is not None else place,
            caption=clip(" ".join(f"{turn.role}: {turn.text}" for turn in record.turns)),
            images=list(record.images),
            turns=[{"role": turn.role, "text": turn.text[:LONGEST_TURN]} for turn in record.turns],
        )

    def finish(self) -> None:
        self.found.about["without_pictures"] = self.absent["pictures"]
        if self.absent["id"]:
            self.found.notes.append(f"{share(self.absent['id'], self.used)} records examined have no id")
        self.tell_twice("an id")


class PromptedStatistics(WithPictures):
    """PaliGemma's examples."""

    def add(self, entry: tuple[str, Prompted]) -> None:
        place, record = entry
        self.used += 1
        self.names(*([record.image] if record.image else []))
        self.absent["suffix"] += record.suffix is None
        self.lengths("words", record.suffix or "")
        self.show(
            key=place,
            caption=clip(f"{record.prefix} → {record.suffix if record.suffix is not None else '?'}"),
            images=[record.image] if record.image else [],
            turns=[
                {"role": "user", "text": record.prefix[:LONGEST_TURN]},
                *(
                    [{"role": "assistant", "text": record.suffix[:LONGEST_TURN]}]
                    if record.suffix is not None
                    else []
                ),
            ],
        )

    def finish(self) -> None:
        self.found.about["without_pictures"] = self.absent["pictures"]
        if self.absent["suffix"]:
            self.found.notes.append(
                f"{share(self.absent['suffix'], self.used)} records examined have no suffix: nothing to learn there"
            )


TALLIES: dict[str, type[RecordStatistics]] = {
    "pairs": PairStatistics,
    "lines": PairStatistics,
    "outcomes": OutcomeStatistics,
    "documents": DocumentStatistics,
    "conversations": ConversationStatistics,
    "prompted": PromptedStatistics,
}
