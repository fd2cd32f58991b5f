"""What the index keeps of a shard, as rows of a table: of shards.parquet, and of the parts of an unfinished walk."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import xxhash

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.sources.offset_file import check_of, pack_starts
from data_pipeline.sources.scan import Scan, scan_file
from data_pipeline.storage.parquet_table import column, read_table, text_column

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Record:
    """One shard.

    path: below the root; count: samples; size: bytes
    version: what changes when the file does, "" where nothing is known that does
    width, check: of its block in the offset file: bytes of an entry, and a hash
    fingerprint: of names, sizes and offsets of the members
    members: JSON, extension -> samples that have it; imageless: samples without an image
    split: JSON, keys whose members are not adjacent
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

    def is_of(self, size: int, version: str) -> bool:
        """True if the file is certainly the one that was walked."""
        return bool(version) and (self.size, self.version) == (size, version)


@dataclass(frozen=True, slots=True)
class Walked:
    """A shard's record and its block of offsets; where it could not be walked, what is wrong with it instead."""

    url: str
    record: Record | None = None
    block: bytes = b""
    problem: str = ""


TYPES = {
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
}


def walk_shard(url: str, path: str, size: int, version: str) -> Walked:
    """Walk one tar. What is wrong with it becomes a problem: the others are walked all the same."""
    try:
        found = scan_file(url, size)
        block, width = pack_starts(found.starts)
    except UserError as error:
        return Walked(url, problem=str(error) if url in str(error) else f"{url} {error}")
    except OSError as error:
        return Walked(url, problem=str(error) if url in str(error) else f"{url} cannot be read: {error}")
    return Walked(url, _record(path, size, version, found, block, width), block)


def _record(path: str, size: int, version: str, found: Scan, block: bytes, width: int) -> Record:
    return Record(
        path,
        found.samples,
        size,
        version,
        width,
        check_of(block, found.samples),
        found.fingerprint,
        json.dumps(found.members, sort_keys=True),
        found.imageless,
        json.dumps(found.split),
    )


def to_table(
    records: Sequence[Record],
    more: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> pa.Table:
    """Rows of records beside the columns in `more`."""
    import pyarrow as pa

    columns = {
        name: pa.array([getattr(record, name) for record in records], getattr(pa, kind)())
        for name, kind in TYPES.items()
    }
    return pa.table({**columns, **(more or {})}, metadata=dict(metadata or {}))


def from_table(table: pa.Table) -> list[Record]:
    """Raises KeyError if a column is not there, ValueError if it is of another type."""
    columns = {
        name: text_column(table, name) if kind == "string" else column(table, name).tolist()
        for name, kind in TYPES.items()
    }
    for name, kind in (("members", dict), ("split", list)):
        columns[name] = [sys.intern(value) for value in columns[name]]  # alike in nearly all shards
        if not all(isinstance(json.loads(value), kind) for value in set(columns[name])):
            raise ValueError(f"column {name} is not what was written")
    return [Record(*row) for row in zip(*columns.values(), strict=True)]


def write_part(folder: str, walked: Iterable[Walked]) -> str:
    """Keep finished shards where a later run finds them; the file's url. It appears whole or not at all."""
    import pyarrow as pa

    done = [one for one in walked if one.record is not None]
    blocks = pa.array([one.block for one in done], pa.large_binary())
    table = to_table([one.record for one in done if one.record is not None], {"block": blocks})
    name = xxhash.xxh64_hexdigest("\n".join(one.url for one in done).encode("utf-8", "surrogateescape"))
    url = storage.join(folder, f"part-{name}.parquet")
    storage.publish_table(url, table)
    return url


def read_part(url: str) -> Iterator[tuple[Record, bytes]]:
    """Shards of a part, those of them that are intact; none of a file that is no part."""
    try:
        table, _ = read_table(url)
        rows = list(zip(from_table(table), table["block"].to_pylist(), strict=True))
    except (KeyError, ValueError, FileNotFoundError):
        return
    for record, block in rows:
        if check_of(block, record.count) == record.check:
            yield record, block
