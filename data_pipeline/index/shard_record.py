"""One shard's row in shards.parquet and in the parts of an unfinished index."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import xxhash

from data_pipeline import storage
from data_pipeline.errors import ReadError, UserError
from data_pipeline.sources.offset_file import check_of, pack_starts
from data_pipeline.sources.scan import Scan, scan_file
from data_pipeline.storage.parquet_table import column, read_table, text_column

if TYPE_CHECKING:
    import pyarrow as pa

MAX_EXTENSIONS = 64  # names with dots can give a sample thousands of extensions


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One shard.

    path: relative to the root; count: samples; size: bytes
    version: text that changes with the file (modification time or hash of the ETag), "" if there is none
    width, check: bytes per entry and hash of its block in the offset file
    fingerprint: hash of names, sizes and offsets of the members
    members: JSON, extension -> samples that have it, for the MAX_EXTENSIONS most frequent
    imageless: samples without an image
    split: JSON, first few keys whose members are not adjacent
    left_out: JSON of `LeftOut`: what is in no sample
    """

    path: str
    count: int
    size: int
    version: str
    width: int
    check: int
    fingerprint: str
    members: str
    imageless: int
    split: str
    left_out: str = "{}"

    def matches(self, size: int, version: str) -> bool:
        """True if the file is known to be unchanged since its scan."""
        return bool(version) and (self.size, self.version) == (size, version)


@dataclass(frozen=True, slots=True)
class ScannedShard:
    """Result of a scan: the shard's record and offset block, or the `problem` that makes it unusable."""

    url: str
    record: ShardRecord | None = None
    block: bytes = b""
    problem: str = ""


COLUMN_TYPES = {
    "path": "string",
    "count": "int64",
    "size": "int64",
    "version": "string",
    "width": "uint8",
    "check": "uint64",
    "fingerprint": "string",
    "members": "string",
    "imageless": "int64",
    "split": "string",
    "left_out": "string",
}


def scan_shard(url: str, path: str, size: int, version: str) -> ScannedShard:
    """Scan one tar. An error becomes a problem of the result, so that the other tars are scanned all the same."""
    try:
        scan = scan_file(url, size)
    except UserError as error:
        return ScannedShard(url, problem=str(error))
    except OSError as error:
        is_named = isinstance(error, ReadError) or error.filename is not None
        return ScannedShard(url, problem=str(error) if is_named else f"{url} cannot be read: {error}")
    try:
        block, width = pack_starts(scan.starts)
    except UserError as error:
        return ScannedShard(url, problem=f"{url} {error}")
    return ScannedShard(url, _record(path, size, version, scan, block, width), block)


def _record(path: str, size: int, version: str, scan: Scan, block: bytes, width: int) -> ShardRecord:
    return ShardRecord(
        path,
        scan.samples,
        size,
        version,
        width,
        check_of(block, scan.samples),
        scan.fingerprint,
        json.dumps(dict(Counter(scan.members).most_common(MAX_EXTENSIONS)), sort_keys=True),
        scan.imageless,
        json.dumps(scan.split),
        scan.left_out.to_json(),
    )


def to_table(
    records: Sequence[ShardRecord],
    extra_columns: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> pa.Table:
    """Table with one row per record and the extra columns."""
    import pyarrow as pa

    columns = {
        name: pa.array([getattr(record, name) for record in records], getattr(pa, kind)())
        for name, kind in COLUMN_TYPES.items()
    }
    return pa.table({**columns, **(extra_columns or {})}, metadata=dict(metadata or {}))


def from_table(table: pa.Table) -> list[ShardRecord]:
    """Records of a table. Raises KeyError if a column is missing, ValueError if it has another type."""
    columns = {
        name: text_column(table, name) if kind == "string" else column(table, name).tolist()
        for name, kind in COLUMN_TYPES.items()
    }
    for name, kind in (("members", dict), ("split", list), ("left_out", dict)):
        columns[name] = [sys.intern(value) for value in columns[name]]  # equal in nearly all shards
        if not all(isinstance(json.loads(value), kind) for value in set(columns[name])):
            raise ValueError(f"column {name} has unexpected JSON")
    return [ShardRecord(*row) for row in zip(*columns.values(), strict=True)]


def write_part(folder: str, shards: Iterable[ScannedShard]) -> str:
    """Save scanned shards for a later run, atomically; returns the URL of the part."""
    import pyarrow as pa

    done = [shard for shard in shards if shard.record is not None]
    blocks = pa.array([shard.block for shard in done], pa.large_binary())
    table = to_table([shard.record for shard in done if shard.record is not None], {"block": blocks})
    name = xxhash.xxh64_hexdigest("\n".join(shard.url for shard in done).encode("utf-8", "surrogateescape"))
    url = storage.join(folder, f"part-{name}.parquet")
    storage.publish_table(url, table)
    return url


def read_part(url: str) -> Iterator[tuple[ShardRecord, bytes]]:
    """Yield the intact (record, block) pairs of a part; nothing if the file is not a part."""
    try:
        table, _ = read_table(url)
        rows = list(zip(from_table(table), table["block"].to_pylist(), strict=True))
    except (KeyError, ValueError, FileNotFoundError):
        return
    for record, block in rows:
        if check_of(block, record.count) == record.check:
            yield record, block
