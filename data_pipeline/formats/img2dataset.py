"""img2dataset's output, written and read back: tars of image, txt and json, a parquet of all rows, statistics."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.formats import parquet
from data_pipeline.formats.parquet import Column, match_columns, missing_columns, python_values, type_problems
from data_pipeline.formats.records import BadRecord
from data_pipeline.sources.tar import TarWriter

SUCCESS = "success"
FAILURES = ("failed_to_download", "failed_to_resize")
SAMPLES_PER_SHARD = 10_000
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
MAX_REASON_CHARACTERS = 80


@dataclass(frozen=True)
class Row:
    """One input row: an image with its caption, or a failure (no image, but status and error_message)."""

    url: str
    caption: str | None
    image: bytes | None
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    extension: str = "jpg"
    status: str = SUCCESS
    error_message: str | None = None
    exif: str = "{}"
    extra: Mapping[str, Any] = field(default_factory=dict)


def shard_name(shard: int, digits: int = 5) -> str:
    return f"{shard:0{digits}d}"


def sample_key(shard: int, index: int, per_shard: int = SAMPLES_PER_SHARD, digits: int = 5) -> str:
    """Key of a row, such as `000020037` for row 37 of shard 2. img2dataset numbers all rows, also failures."""
    power = math.ceil(math.log10(per_shard)) if per_shard > 1 else 1
    return f"{shard * 10**power + index:0{digits + power}d}"


def write_shard(
    folder: str, shard: int, rows: Sequence[Row], per_shard: int = SAMPLES_PER_SHARD, digits: int = 5
) -> dict[str, Any]:
    """Write SHARD.tar, SHARD.parquet and, last, SHARD_stats.json; returns the statistics.

    The tar holds the successes, the parquet every row. Times in the statistics are 0, so that the same rows give the
    same bytes. Raises UserError for more than `per_shard` rows, or a status that contradicts the row.
    """
    if len(rows) > per_shard:
        raise UserError(f"{folder}: {len(rows)} rows exceed the {per_shard} rows of a shard")
    base = storage.join(folder, shard_name(shard, digits))
    metadata = []
    with TarWriter(f"{base}.tar") as tar:
        for index, row in enumerate(rows):
            key = sample_key(shard, index, per_shard, digits)
            record = _record(row, key)
            metadata.append(record)
            if row.image is not None:
                members = {row.extension: row.image, "json": json.dumps(record, indent=4).encode()}
                if row.caption is not None:
                    members["txt"] = row.caption.encode()
                tar.write(key, members)
    storage.publish_table(f"{base}.parquet", _table(metadata))
    stats = _statistics(rows)
    # The statistics come last: to img2dataset, a shard with statistics is finished.
    storage.publish(f"{base}_stats.json", json.dumps(stats, indent=4).encode())
    return stats


def _record(row: Row, key: str) -> dict[str, Any]:
    """Metadata of a row, for the json member and the parquet; columns in img2dataset's order."""
    if (row.image is None) == (row.status == SUCCESS):
        raise UserError(
            f"{key}: status {row.status!r} contradicts a row with {'no ' if row.image is None else 'an '}image"
        )
    if row.status not in (SUCCESS, *FAILURES):
        raise UserError(f"{key}: status {row.status!r} is not one of {', '.join((SUCCESS, *FAILURES))}")
    return {
        **row.extra,
        "caption": row.caption,
        "url": row.url,
        "key": key,
        "status": row.status,
        "error_message": row.error_message,
        "width": row.width,
        "height": row.height,
        "original_width": row.width if row.original_width is None else row.original_width,
        "original_height": row.height if row.original_height is None else row.original_height,
        "exif": None if row.image is None else row.exif,
        "sha256": None if row.image is None else hashlib.sha256(row.image).hexdigest(),
    }


def _table(metadata: Sequence[Mapping[str, Any]]) -> Any:
    import pyarrow as pa

    text, number = pa.string(), pa.int32()
    known = {
        **dict.fromkeys(("caption", "url", "key", "status", "error_message", "exif", "sha256"), text),
        **dict.fromkeys(("width", "height", "original_width", "original_height"), number),
    }
    names = list(dict.fromkeys(name for record in metadata for name in record)) or list(known)
    columns = {name: pa.array([record.get(name) for record in metadata], known.get(name)) for name in names}
    return pa.table(columns)


def _statistics(rows: Sequence[Row]) -> dict[str, Any]:
    statuses = Counter(
        row.error_message if row.image is None and row.error_message else row.status for row in rows
    )
    return {
        "count": len(rows),
        "successes": sum(row.status == SUCCESS for row in rows),
        **{failure: sum(row.status == failure for row in rows) for failure in FAILURES},
        "duration": 0.0,
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": dict(sorted(statuses.items())),
    }


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one input row. `reason`: why there is no image, "" if there is one."""

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
class OutcomeCounts:
    """Counts over shards: rows of the parquets, successes, failures by status and reason, unusable rows."""

    shards: int = 0
    rows: int = 0
    successes: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    bad_rows: int = 0

    def add(self, outcome: Outcome | BadRecord) -> None:
        self.rows += 1
        if isinstance(outcome, BadRecord):
            self.bad_rows += 1
        elif outcome.succeeded:
            self.successes += 1
        else:
            self.failures[f"{outcome.status}: {outcome.reason}" if outcome.reason else outcome.status] += 1


def is_output(names: Sequence[str]) -> bool:
    """True if a parquet file with these columns is img2dataset's."""
    return {"key", "status", "error_message"} <= {name.lower() for name in names}


def read_outcomes(path: str, rows: int = 1024) -> Iterator[Outcome | BadRecord]:
    """Yield every row of every parquet file of `path` in input order, also failures.

    Reasons of a BadRecord: `missing key`, `missing status`, `not UTF-8`. Raises UserError if a column is missing.
    """
    for file in parquet.list_files(path):
        with parquet.open_file(file) as source:
            yield from outcomes_of(file, source, rows)


def outcomes_of(file: str, source: Any, rows: int = 1024) -> Iterator[Outcome | BadRecord]:
    """`read_outcomes` of one open parquet file."""
    schema = source.schema_arrow
    problems = type_problems(schema, COLUMNS)
    fatal = missing_columns(schema.names, COLUMNS) + [
        problems[m] for m in ("key", "status", "reason") if m in problems
    ]
    if fatal:
        raise UserError(f"{file}: {fatal[0]}")
    meanings = ("key", "status", "reason", "url", "caption", "width", "height")
    found = match_columns(schema.names, COLUMNS)
    taken = {meaning: found[meaning] for meaning in meanings if meaning in found and meaning not in problems}
    number = 0
    for batch in source.iter_batches(batch_size=rows, columns=list(dict.fromkeys(taken.values()))):
        columns = [
            python_values(batch.column(taken[meaning])) if meaning in taken else [None] * batch.num_rows
            for meaning in meanings
        ]
        for row in zip(*columns, strict=True):
            yield _outcome(row, file, number)
            number += 1


def _outcome(row: Sequence[Any], file: str, number: int) -> Outcome | BadRecord:
    key, status, reason, url, caption, width, height = row
    place = f"row {number}"
    if any(isinstance(value, bytes) for value in row):
        return BadRecord(file, place, "not UTF-8")
    if not key:
        return BadRecord(file, place, "missing key")
    if not status:
        return BadRecord(file, place, "missing status", key)
    reason = " ".join((reason or "").split())[:MAX_REASON_CHARACTERS]
    sizes = (int(side) if side is not None and side == side else None for side in (width, height))
    return Outcome(key, status, reason, url or "", caption, *sizes)


def mismatched_key(stem: str, keys: Sequence[str]) -> str | None:
    """A sentence about the first key that does not begin with the number of shard `stem`; None if all do.

    img2dataset numbers rows as 10^k x shard + index; LAION-2B's shards have six digits, others five.
    """
    if not re.fullmatch(r"\d+", stem):
        return None
    mismatched = next(
        (key for key in keys if not re.fullmatch(r"\d+", key) or not key.startswith(stem)), None
    )
    return None if mismatched is None else f"key {mismatched} does not belong to shard {stem}"
