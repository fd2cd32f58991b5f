"""img2dataset's output: tars of image, txt and json, a parquet of all rows, statistics written last."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.sources.tar import TarWriter

SUCCESS = "success"
FAILURES = ("failed_to_download", "failed_to_resize")
SAMPLES_PER_SHARD = 10_000


@dataclass(frozen=True)
class Row:
    """One line of the input: an image with its caption, or a failure (no image, status, error_message)."""

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
    """`000020037` for sample 37 of shard 2: img2dataset numbers all rows, failures too."""
    power = math.ceil(math.log10(per_shard)) if per_shard > 1 else 1
    return f"{shard * 10**power + index:0{digits + power}d}"


def write_shard(
    folder: str, shard: int, rows: Sequence[Row], per_shard: int = SAMPLES_PER_SHARD, digits: int = 5
) -> dict[str, Any]:
    """Write SHARD.tar, SHARD.parquet and, last, SHARD_stats.json; returns the statistics.

    The tar holds the successes, the parquet every row. Times in the statistics are 0: the same rows give
    the same bytes, and nothing was downloaded.
    """
    if len(rows) > per_shard:
        raise UserError(f"{folder}: {len(rows)} rows for a shard of at most {per_shard}")
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
    # img2dataset takes a shard for finished when its statistics exist, so they come last.
    storage.publish(f"{base}_stats.json", json.dumps(stats, indent=4).encode())
    return stats


def _record(row: Row, key: str) -> dict[str, Any]:
    """The row's metadata in img2dataset's order of columns: the json member and the parquet row."""
    if (row.image is None) == (row.status == SUCCESS):
        raise UserError(
            f"{key}: status {row.status!r} does not go with {'no ' if row.image is None else 'an '}image"
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
