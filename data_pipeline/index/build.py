"""`dromos data index`: every tar of a source walked once; shards.parquet and one packed file of offsets."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import xxhash

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.index.folder import (
    Work,
    alone,
    check_writable,
    recall_index,
    recall_parts,
    remove_empty,
    write,
)
from data_pipeline.index.parallel import walk_all
from data_pipeline.index.shard_record import Record, Walked, walk_shard, write_part
from data_pipeline.sources.manifest import (
    INDEX_FOLDER,
    Manifest,
    open_source,
    paths_below,
    read_stats,
    shard_lengths,
    stats_url,
    tokenizer_of,
    wrong_count,
)

PARTS = "parts"
PART_BYTES = 16 << 20
Progress = Callable[[int, int, int, int], None]
"""Told shards walked, shards to walk, and the samples and bytes of those walked."""
LOOKED_AT = 3  # pieces of each of two shards with equal headers that are compared
KEY_HASH_BYTES = 64 << 10


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
    check_writable(root, paths)
    work = Work(root)
    recall_index(work, root)
    parts = recall_parts(work, storage.join(folder, PARTS))
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
    with alone(folder):
        order = paths
        if storage.is_pattern(path) or path.endswith(storage.SHARD_SUFFIX):
            recall_index(work, root, but=set(paths))  # another run may have indexed other shards meanwhile
            others = sorted(set(work.records) - set(paths))
            order = paths + [other for other in others if storage.exists(storage.join(root, other))]
        write(work, folder, order, tokenizer)
    storage.remove(parts)
    remove_empty(storage.join(folder, PARTS))
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


def _walk(
    work: Work,
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


@dataclass(frozen=True)
class Findings:
    """same: groups of shard paths with the same samples; split: shard path -> keys whose members lie apart."""

    same: list[list[str]]
    split: dict[str, list[str]]


def find(root: str, records: Sequence[Record]) -> Findings:
    """Compare shards. Equal headers alone prove nothing where keys count from 0 and members have one size, so
    pieces of the content are compared too."""
    alike: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in records:
        if record.count:
            alike[record.fingerprint, record.size].append(record)
    same = []
    for group in alike.values():
        if len(group) > 1:
            by_content: dict[int, list[str]] = defaultdict(list)
            for record in group:
                by_content[_content(storage.join(root, record.path), record.size)].append(record.path)
            same += [paths for paths in by_content.values() if len(paths) > 1]
    split = {record.path: json.loads(record.split) for record in records if record.split != "[]"}
    return Findings(same, split)


def _content(url: str, size: int) -> int:
    state = xxhash.xxh64()
    for piece in range(LOOKED_AT):
        start = (size - min(size, KEY_HASH_BYTES)) * piece // (LOOKED_AT - 1)
        state.update(storage.read_range(url, start, min(KEY_HASH_BYTES, size - start)))
    return state.intdigest()
