"""The folder of an index: what is taken over from it and from unfinished runs, and how a new one takes its place."""

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
from data_pipeline.index.shard_record import Record, from_table, read_part, to_table
from data_pipeline.sources.manifest import FORMAT, INDEX_FOLDER, OFFSETS, digest_of, read_index
from data_pipeline.sources.offset_file import block_bytes, check_of

STALE = 24 * 3600.0  # seconds after which nobody is taken to still write or read what no index names
PROBE = "may-write"


@dataclass
class Work:
    """Records and blocks by path. Blocks lie in memory that belongs to files: that of a source can be gigabytes."""

    root: str
    records: dict[str, Record] = field(default_factory=dict)
    _blocks: dict[str, tuple[int, int] | memoryview] = field(default_factory=dict)
    _spool: Any = field(default_factory=tempfile.TemporaryFile)
    _end: int = 0

    def keep(self, record: Record, block: bytes | memoryview) -> None:
        self.records[record.path] = record
        if isinstance(block, memoryview):
            self._blocks[record.path] = block
            return
        self._spool.write(block)
        self._blocks[record.path] = (self._end, self._end + len(block))
        self._end += len(block)

    def blocks(self, paths: Iterable[str]) -> Iterable[bytes | memoryview]:
        self._spool.flush()
        data = mmap.mmap(self._spool.fileno(), 0, access=mmap.ACCESS_READ) if self._end else b""
        for path in paths:
            block = self._blocks[path]
            yield block if isinstance(block, memoryview) else data[block[0] : block[1]]


def check_writable(root: str, paths: Sequence[str]) -> None:
    """Raises UserError, before anything is walked, if what is found could not be kept in `ROOT/_index/`."""
    try:
        "".join(paths).encode()
    except UnicodeEncodeError:
        odd = next(path for path in paths if not path.isprintable())
        raise UserError(f"{root}: {odd!r} is no name in UTF-8; rename the tar") from None
    if storage.is_remote(root):
        probe = storage.join(storage.join(root, INDEX_FOLDER), PROBE)
        storage.publish(probe, b"")
        with suppress(UserError):  # who may write need not be allowed to delete
            storage.remove([probe])
        return
    folder = storage.local_path(storage.join(root, INDEX_FOLDER))
    there = folder if os.path.lexists(folder) else storage.local_path(root) or "."
    if not (os.path.isdir(there) and os.access(there, os.W_OK)):
        raise UserError(
            f"{folder} cannot be written to; get write access to {root}, or use links to its files in a folder of your "
            "own"
        )


def recall_index(work: Work, root: str, but: Set[str] = frozenset()) -> None:
    """Take over what the index that is there says of all shards `but` some. One that cannot be read says nothing."""
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
        if record.path not in but and check_of(block, record.count) == record.check:
            work.keep(record, block)


def recall_parts(work: Work, folder: str) -> list[str]:
    """Take over what an unfinished run left; the urls of its parts."""
    try:
        urls = storage.list_files(folder, ".parquet")
    except UserError:
        return []
    for url in urls:
        for record, block in read_part(url):
            work.keep(record, block)
    return urls


@contextmanager
def alone(folder: str) -> Iterator[None]:
    """One run at a time writes an index, where the file system has locks: the offsets that it removes because its
    table names others must not be those that another run's table is about to name."""
    if storage.is_remote(folder):
        yield
        return
    local = storage.local_path(folder)
    os.makedirs(local, exist_ok=True)
    descriptor = os.open(local, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _offsets_named(root: str) -> str | None:
    try:
        indexed = read_index(root)
    except (UserError, FileNotFoundError):
        return None
    return None if indexed is None else indexed[1]


def write(work: Work, folder: str, order: list[str], tokenizer: str | None) -> None:
    import pyarrow as pa

    replaced = _offsets_named(work.root)
    records = [work.records[path] for path in order]
    state = xxhash.xxh64(np.array([record.check for record in records], np.uint64).tobytes())
    name = f"offsets-{state.hexdigest()}.bin"
    starts: list[int] = []
    end = 0
    with storage.publishing(storage.join(folder, name)) as file:
        for block in work.blocks(order):
            starts.append(end)
            end += len(block)
            file.write(block)
    table = to_table(records, {"block": pa.array(starts, pa.int64())})
    metadata = {
        "dromos_index": FORMAT,
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
    """Offsets that no index names, and files that a killed run had not finished; a reader that has offsets mapped keeps
    them. Another run may be about to name new ones."""
    for name in os.listdir(folder):
        old = name != keep and (re.fullmatch(OFFSETS, name) or name.endswith(storage.TEMPORARY))
        with suppress(FileNotFoundError):
            if old and time.time() - os.stat(os.path.join(folder, name)).st_mtime > STALE:
                os.unlink(os.path.join(folder, name))


def remove_empty(folder: str) -> None:
    if not storage.is_remote(folder) and os.path.isdir(folder) and not os.listdir(folder):
        os.rmdir(folder)
