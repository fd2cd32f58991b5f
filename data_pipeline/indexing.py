"""`dromos data index`: every tar of a source walked once; shards.parquet and one packed file of offsets."""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from data_pipeline import storage
from data_pipeline.duplicates import Findings, find
from data_pipeline.errors import UserError
from data_pipeline.manifest import (
    FORMAT,
    INDEX_FOLDER,
    OFFSETS,
    Manifest,
    digest_of,
    open_source,
    paths_below,
    read_index,
    read_stats,
    shard_lengths,
    stats_url,
    tokenizer_of,
    wrong_count,
)
from data_pipeline.offsets import block_bytes, check_of
from data_pipeline.shard_record import (
    Record,
    Walked,
    from_table,
    read_part,
    to_table,
    walk_shard,
    write_part,
)
from data_pipeline.walkers import walk_all

PARTS = "parts"
PART_BYTES = 16 << 20
STALE = 24 * 3600.0  # seconds after which nobody is taken to still write or read what no index names

Progress = Callable[[int, int, int, int], None]
"""Told shards walked, shards to walk, and the samples and bytes of those walked."""


@dataclass(frozen=True)
class Indexed:
    """What an indexing did: tars walked, their bytes and samples, seconds of the walk; tars known before; oddities."""

    manifest: Manifest
    walked: int
    kept: int
    bytes: int
    samples: int
    seconds: float
    findings: Findings


@dataclass
class _Work:
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


def build_index(
    path: str, jobs: int = 1, progress: Progress | None = None, part_seconds: float = 5.0
) -> Indexed:
    """Walk the tars of a source that are new or changed; write `ROOT/_index/`.

    Shards known to an earlier index, or to the parts that a killed run left, are not walked again if their size and
    their time of change (or the store's ETag) are the same. The offsets are written first, under a name that holds
    their hash; shards.parquet, which names them, appears last and whole: a reader sees the old index or the new
    one. Finished shards are kept in parts every `part_seconds`.

    `jobs` processes walk. Raises one UserError that lists every tar that is no whole tar, or that its
    `_stats.json` contradicts; the others are kept in parts.
    """
    urls = storage.list_shards(path)
    root = storage.root_of(path)
    folder = storage.join(root, INDEX_FOLDER)
    tags: dict[str, int] = {}
    sizes = shard_lengths(urls, path, tags)
    stats = read_stats(urls)
    tokenizer = tokenizer_of(stats)
    paths = paths_below(root, urls)
    work = _Work(root)
    _recall_index(work, root)
    parts = _recall_parts(work, storage.join(folder, PARTS))
    todo = [
        (url, below, sizes[url], version)
        for url, below in zip(urls, paths, strict=True)
        for version in [_version(url, tags)]
        if below not in work.records or not work.records[below].is_of(sizes[url], version)
    ]
    began = time.monotonic()
    problems, walked = _walk(work, todo, jobs, progress, storage.join(folder, PARTS), part_seconds, parts)
    seconds = time.monotonic() - began
    for url, below in zip(urls, paths, strict=True):
        if url in stats and below in work.records and url not in problems:
            promised, found = stats[url]["successes"], work.records[below].count
            if promised != found:
                problems[url] = str(wrong_count(url, promised, found, stats_url(url)))
    if problems:
        raise _refusal(path, root, list(problems.values()), len(urls))
    if not sum(work.records[below].count for below in paths):
        raise UserError(f"the {len(urls)} tars in {root} hold no samples; make the data again")
    others = set(work.records) - set(paths) if storage.is_pattern(path) or path.endswith(".tar") else set()
    order = paths + sorted(other for other in others if storage.exists(storage.join(root, other)))
    with _alone(folder):
        _write(work, folder, order, tokenizer)
    storage.remove(parts)
    _remove_folder(storage.join(folder, PARTS))
    return Indexed(
        open_source(os.path.basename(root) or root, path),
        walked=len(todo),
        kept=len(urls) - len(todo),
        bytes=sum(size for _, _, size, _ in todo),
        samples=walked,
        seconds=seconds,
        findings=find(root, [work.records[below] for below in paths]),
    )


def _version(url: str, tags: dict[str, int]) -> str:
    if storage.is_remote(url):
        return f"{tags[url]:016x}" if url in tags else ""
    return str(os.stat(storage.local_path(url)).st_mtime_ns)


def _recall_index(work: _Work, root: str) -> None:
    """Take over what the index that is there says. One that cannot be read says nothing."""
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
        if check_of(block, record.count) == record.check:
            work.keep(record, block)


def _recall_parts(work: _Work, folder: str) -> list[str]:
    """Take over what an unfinished run left; the urls of its parts."""
    try:
        urls = storage.list_files(folder, ".parquet")
    except UserError:
        return []
    for url in urls:
        for record, block in read_part(url):
            work.keep(record, block)
    return urls


def _walk(
    work: _Work,
    todo: Sequence[tuple[str, str, int, str]],
    jobs: int,
    progress: Progress | None,
    folder: str,
    part_seconds: float,
    parts: list[str],
) -> tuple[dict[str, str], int]:
    """Problems by url, and samples walked. `parts` grows by those written."""
    problems: dict[str, str] = {}
    fresh: list[Walked] = []
    sizes = {url: size for url, _, size, _ in todo}
    samples = done_bytes = fresh_bytes = 0
    last = time.monotonic()
    for done, one in enumerate(walk_all(walk_shard, todo, jobs), 1):
        done_bytes += sizes[one.url]
        if one.record is None:
            problems[one.url] = one.problem
        else:
            work.keep(one.record, one.block)
            samples += one.record.count
            fresh.append(one)
            fresh_bytes += len(one.block)
        late = time.monotonic() - last >= part_seconds
        if fresh and done < len(todo) and (late or fresh_bytes >= PART_BYTES):
            parts.append(write_part(folder, fresh))
            fresh, fresh_bytes, last = [], 0, time.monotonic()
        if progress is not None:
            progress(done, len(todo), samples, done_bytes)
    if problems and fresh:
        parts.append(write_part(folder, fresh))
    return problems, samples


def _refusal(path: str, root: str, problems: list[str], shards: int) -> UserError:
    if len(problems) == 1 and shards == 1:
        return UserError(problems[0])
    return UserError(
        f"{len(problems)} of the {shards} tars of {path} cannot be indexed: {'; '.join(problems)}. Make these again "
        f"or remove them, then run: dromos data index {root}; the others, kept in "
        f"{storage.join(root, INDEX_FOLDER)}/{PARTS}, are not walked again"
    )


@contextmanager
def _alone(folder: str) -> Iterator[None]:
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


def _write(work: _Work, folder: str, order: list[str], tokenizer: str | None) -> None:
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
    """Offsets that no index names; a reader that has them mapped keeps them. Another run may be about to name new
    ones."""
    for name in os.listdir(folder):
        old = re.fullmatch(OFFSETS, name) and name != keep
        if old and time.time() - os.stat(os.path.join(folder, name)).st_mtime > STALE:
            os.unlink(os.path.join(folder, name))


def _remove_folder(folder: str) -> None:
    if not storage.is_remote(folder) and os.path.isdir(folder) and not os.listdir(folder):
        os.rmdir(folder)
