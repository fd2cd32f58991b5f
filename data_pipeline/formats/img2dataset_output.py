"""What img2dataset wrote, read back: a parquet of every row beside each tar, which holds the successes alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.formats import parquet
from data_pipeline.formats.columns import Column, match, missing, values, wrong_types
from data_pipeline.formats.img2dataset import SUCCESS
from data_pipeline.formats.records import Verdict

COLUMNS = (
    Column("key", ("key",), "text", required=True),
    Column("status", ("status",), "text", required=True),
    Column("reason", ("error_message",), "text"),
    Column("url", ("url",), "text"),
    Column("caption", ("caption", "text"), "text"),
    Column("width", ("width",), "number"),
    Column("height", ("height",), "number"),
    Column("original width", ("original_width",), "number"),
    Column("original height", ("original_height",), "number"),
    Column("exif", ("exif",), "text"),
    Column("sha256", ("sha256",), "text"),
)
LONGEST_REASON = 80


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one row of the input; `reason` says why there is no picture, "" where there is one."""

    key: str
    status: str
    reason: str
    url: str
    caption: str | None
    width: int | None
    height: int | None

    @property
    def succeeded(self) -> bool:
        return self.status == SUCCESS


@dataclass
class Sums:
    """Counts over shards: rows of the parquet, successes among them, failures by status and reason."""

    shards: int = 0
    rows: int = 0
    successes: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    bad_rows: int = 0

    def add(self, outcome: Outcome | Verdict) -> None:
        self.rows += 1
        if isinstance(outcome, Verdict):
            self.bad_rows += 1
        elif outcome.succeeded:
            self.successes += 1
        else:
            self.failures[f"{outcome.status}: {outcome.reason}" if outcome.reason else outcome.status] += 1


def is_output(names: Sequence[str]) -> bool:
    """Whether a parquet file with these columns is one of img2dataset's."""
    return {"key", "status", "error_message"} <= {name.lower() for name in names}


def read_outcomes(path: str, rows: int = 1024) -> Iterator[Outcome | Verdict]:
    """Every row of every parquet file of `path`, failures too, in order of the input.

    Verdicts: `missing key`, `missing status`, `not UTF-8`. Raises UserError where a file has not these columns.
    """
    for file in parquet.list_files(path):
        with parquet.opened(file) as source:
            yield from outcomes_of(file, source, rows)


def outcomes_of(file: str, source: Any, rows: int = 1024) -> Iterator[Outcome | Verdict]:
    """`read_outcomes` for one opened file."""
    schema = source.schema_arrow
    wrong = wrong_types(schema, COLUMNS)
    fatal = missing(schema.names, COLUMNS) + [wrong[m] for m in ("key", "status", "reason") if m in wrong]
    if fatal:
        raise UserError(f"{file}: {fatal[0]}")
    wanted = ("key", "status", "reason", "url", "caption", "width", "height")
    found = match(schema.names, COLUMNS)
    taken = {meaning: found[meaning] for meaning in wanted if meaning in found and meaning not in wrong}
    number = 0
    for batch in source.iter_batches(batch_size=rows, columns=list(dict.fromkeys(taken.values()))):
        columns = [
            values(batch.column(taken[meaning])) if meaning in taken else [None] * batch.num_rows
            for meaning in wanted
        ]
        for row in zip(*columns, strict=True):
            yield _outcome(row, file, number)
            number += 1


def _outcome(row: Sequence[Any], file: str, number: int) -> Outcome | Verdict:
    key, status, reason, url, caption, width, height = row
    place = f"row {number}"
    if any(isinstance(value, bytes) for value in row):
        return Verdict(file, place, "not UTF-8")
    if not key:
        return Verdict(file, place, "missing key")
    if not status:
        return Verdict(file, place, "missing status", key)
    reason = " ".join((reason or "").split())[:LONGEST_REASON]
    sizes = (int(side) if side is not None and side == side else None for side in (width, height))
    return Outcome(key, status, reason, url or "", caption, *sizes)


def odd_key(stem: str, keys: Sequence[str]) -> str | None:
    """What is wrong with the keys of shard `stem`, or None: each begins with the shard's number.

    img2dataset numbers rows as 10^k x shard + index; LAION-2B's shards have six digits, others five.
    """
    if not re.fullmatch(r"\d+", stem):
        return None
    odd = next((key for key in keys if not re.fullmatch(r"\d+", key) or not key.startswith(stem)), None)
    return None if odd is None else f"key {odd} is not one of shard {stem}"
