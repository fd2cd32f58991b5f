"""The `_index/` folder: resumes from finished parts, replaces the old index atomically."""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.index.shard_record import ShardRecord, from_table, read_part, to_table
from data_pipeline.sources.manifest import INDEX_FOLDER, INDEX_FORMAT, OFFSETS_NAME, digest_of, read_index
from data_pipeline.sources.offset_file import block_bytes, check_of

STALE_AGE = 24 * 3600.0  # seconds after which no run is assumed to use a file that no index names
WRITE_PROBE = "may-write"  # name of an empty object that tests the permission to write


@dataclass
class IndexContent:
    """Records and offset blocks of an index, by shard path.

    The blocks of a source can be gigabytes, so they are kept in file-backed memory: a temporary file, or the memory map
    of an older index.
    """

    root: str
    records: dict[str, ShardRecord] = field(default_factory=dict)
    _blocks: dict[str, tuple[int, int] | memoryview] = field(default_factory=dict)
    _spool: Any = field(default_factory=tempfile.TemporaryFile)
    _end: int = 0

    def add(self, record: ShardRecord, block: bytes | memoryview) -> None:
        self.records[record.path] = record
        if isinstance(block, memoryview):
            self._blocks[record.path] = block
            return
        self._spool.write(block)
        self._blocks[record.path] = (self._end, self._end + len(block))
        self._end += len(block)

    def blocks(self, paths: Iterable[str]) -> Iterable[bytes | memoryview]:
        """Blocks of the given shards, in order."""
        self._spool.flush()
        data = mmap.mmap(self._spool.fileno(), 0, access=mmap.ACCESS_READ) if self._end else b""
        for path in paths:
            block = self._blocks[path]
            yield block if isinstance(block, memoryview) else data[block[0] : block[1]]


def check_writable(root: str, paths: Sequence[str]) -> None:
    """Raise UserError if `ROOT/_index/` could not be written; called before any tar is scanned."""
    try:
        "".join(paths).encode()
    except UnicodeEncodeError:
        invalid = next(path for path in paths if not path.isprintable())
        raise UserError(f"{root}: {invalid!r} is not a valid UTF-8 name; rename the tar") from None
    if storage.is_remote(root):
        probe = storage.join(storage.join(root, INDEX_FOLDER), WRITE_PROBE)
        storage.publish(probe, b"")
        with suppress(UserError):  # permission to write does not imply permission to delete
            storage.remove([probe])
        return
    folder = storage.local_path(storage.join(root, INDEX_FOLDER))
    existing = folder if os.path.lexists(folder) else storage.local_path(root) or "."
    if not (os.path.isdir(existing) and os.access(existing, os.W_OK)):
        raise UserError(
            f"{folder} cannot be written to; get write access to {root}, or use links to its files in a folder of your "
            "own"
        )


def load_index(content: IndexContent, root: str, skip: Set[str] = frozenset()) -> None:
    """Add the existing index to `content`, except for the paths in `skip`; ignores an index that cannot be read."""
    try:
        indexed = read_index(root)
        if indexed is None:
            return
        table, url = indexed
        records, starts = from_table(table), table["block"].to_pylist()
        if storage.is_remote(url):
            data = memoryview(storage.read_bytes(url))
        else:
            with storage.open_bytes(url) as file:
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (UserError, KeyError, FileNotFoundError, ValueError):
        return
    for record, start in zip(records, starts, strict=True):
        block = data[start : start + block_bytes(record.count, record.width)]
        if record.path not in skip and check_of(block, record.count) == record.check:
            content.add(record, block)


def load_parts(content: IndexContent, folder: str) -> list[str]:
    """Add the parts of an unfinished run to `content`; returns their URLs."""
    try:
        urls = storage.list_files(folder, ".parquet")
    except UserError:
        return []
    for url in urls:
        for record, block in read_part(url):
            content.add(record, block)
    return urls


@contextmanager
def index_lock(folder: str) -> Iterator[None]:
    """Let one run at a time write the index, on file systems with locks.

    A run removes the offset files that its table does not name. Without the lock, it could remove the file that the
    table of another run is about to name.
    """
    if storage.is_remote(folder):
        yield
        return
    local = storage.local_path(folder)
    storage.make_folder(local)
    descriptor = os.open(local, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _current_offsets(root: str) -> str | None:
    """URL of the offset file of the existing index; None without a readable index."""
    try:
        indexed = read_index(root)
    except (UserError, FileNotFoundError):
        return None
    return None if indexed is None else indexed[1]


def write_index(content: IndexContent, folder: str, order: list[str], tokenizer: str | None) -> None:
    """Write the offset file, publish shards.parquet with the shards in the given order, remove older offset files."""
    import pyarrow as pa

    replaced = _current_offsets(content.root)
    records = [content.records[path] for path in order]
    state = xxhash.xxh64(np.array([record.check for record in records], np.uint64).tobytes())
    name = f"offsets-{state.hexdigest()}.bin"
    starts: list[int] = []
    end = 0
    with storage.publishing(storage.join(folder, name)) as file:
        for block in content.blocks(order):
            starts.append(end)
            end += len(block)
            file.write(block)
    table = to_table(records, {"block": pa.array(starts, pa.int64())})
    metadata = {
        "dromos_index": INDEX_FORMAT,
        "offsets": name,
        "tokenizer": tokenizer or "",
        "digest": digest_of(table, tokenizer or ""),
    }
    storage.publish_table(storage.join(folder, "shards.parquet"), table.replace_schema_metadata(metadata))
    if replaced is not None and not replaced.endswith(name):
        storage.remove([replaced])
    if not storage.is_remote(folder):
        _remove_stale(folder, name)


def _remove_stale(folder: str, keep: str) -> None:
    """Remove old offset files that no index names, and unfinished files of killed runs.

    Recent ones stay, because another run may be writing them. A reader that has mapped a file can still read it.
    """
    for name in os.listdir(folder):
        is_unused = name != keep and (re.fullmatch(OFFSETS_NAME, name) or name.endswith(storage.TEMPORARY))
        with suppress(FileNotFoundError):
            if is_unused and time.time() - os.stat(os.path.join(folder, name)).st_mtime > STALE_AGE:
                os.unlink(os.path.join(folder, name))


def remove_empty(folder: str) -> None:
    """Remove a local folder if it is empty."""
    if not storage.is_remote(folder) and os.path.isdir(folder) and not os.listdir(folder):
        os.rmdir(folder)
