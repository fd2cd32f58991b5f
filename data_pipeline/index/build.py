"""`dromos data index`: scans new and changed tars in parallel and writes the index.

The index of a source is `ROOT/_index/`: shards.parquet, one row per shard, and one packed file of sample offsets.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.index.folder import (
    IndexContent,
    check_writable,
    index_lock,
    load_index,
    load_parts,
    remove_empty,
    write_index,
)
from data_pipeline.index.parallel import map_shards
from data_pipeline.index.shard_record import ScannedShard, ShardRecord, scan_shard, write_part
from data_pipeline.sources.left_out import LeftOutWarning
from data_pipeline.sources.manifest import (
    INDEX_FOLDER,
    Manifest,
    open_source,
    paths_below,
    read_stats,
    shard_lengths,
    stats_url,
    tokenizer_of,
    wrong_count_error,
)
from data_pipeline.sources.sidecars import Count, read_counts

PARTS_FOLDER = "parts"
MAX_PART_BYTES = 16 << 20  # of offsets, after which a part is written
MAX_LISTED_PROBLEMS = 10
COMPARED_RANGES = 3  # byte ranges of two shards with equal headers that are compared
COMPARED_BYTES = 64 << 10  # per range
# Called with shards scanned, shards to scan, and the samples and bytes of those scanned.
Progress = Callable[[int, int, int, int], None]


@dataclass(frozen=True)
class IndexResult:
    """Result of an index run.

    scanned, bytes, samples: tars scanned, their bytes and their samples; seconds: duration of the scan
    reused: tars whose record of an earlier run is still valid
    """

    manifest: Manifest
    scanned: int
    reused: int
    bytes: int
    samples: int
    seconds: float
    findings: Findings


def build_index(
    path: str, jobs: int = 1, progress: Progress | None = None, part_seconds: float = 5.0
) -> IndexResult:
    """Scan the new and changed tars of a source with `jobs` processes, and write `ROOT/_index/`.

    A shard of an earlier index, or of the parts that a killed run left, is not scanned again if its size and its
    modification time (or ETag) are unchanged. Finished shards are saved in parts every `part_seconds`. The offset file
    is written first, under a name that contains its hash; shards.parquet, which names it, is published last, so a
    reader sees the old index or the new one.

    Raises one UserError about all tars that are damaged or contradict their `_stats.json` or the index file of another
    tool; the others stay saved.
    """
    # 1. List the shards, and load their records of earlier runs.
    urls = storage.list_shards(path)
    root = storage.root_of(path)
    folder = storage.join(root, INDEX_FOLDER)
    tags: dict[str, int] = {}
    sizes = shard_lengths(urls, path, tags)
    stats = read_stats(urls)
    tokenizer = tokenizer_of(stats)
    paths = paths_below(root, urls)
    check_writable(root, paths)
    content = IndexContent(root)
    load_index(content, root)
    parts = load_parts(content, storage.join(folder, PARTS_FOLDER))

    # 2. Scan the shards without a valid record.
    todo = [
        (url, below, sizes[url], version)
        for url, below in zip(urls, paths, strict=True)
        for version in [_version(url, tags)]
        if below not in content.records or not content.records[below].matches(sizes[url], version)
    ]
    began = time.monotonic()
    parts_folder = storage.join(folder, PARTS_FOLDER)
    problems, samples = _scan(content, todo, jobs, progress, parts_folder, part_seconds, parts)
    seconds = time.monotonic() - began
    _check_counts(stats, read_counts(root, urls, sizes), urls, paths, content, problems)
    if problems:
        raise _problems_error(path, root, problems, len(urls))
    if not sum(content.records[below].count for below in paths):
        raise UserError(f"the {len(urls)} tars in {root} hold no samples; make the data again")

    # 3. Write the index, then remove the parts.
    with index_lock(folder):
        order = _index_order(path, root, paths, content)
        write_index(content, folder, order, tokenizer)
    storage.remove(parts)
    remove_empty(parts_folder)
    return IndexResult(
        _open_quietly(root, path),
        scanned=len(todo),
        reused=len(urls) - len(todo),
        bytes=sum(size for _, _, size, _ in todo),
        samples=samples,
        seconds=seconds,
        findings=compare_shards(root, [content.records[below] for below in paths]),
    )


def _version(url: str, tags: dict[str, int]) -> str:
    """Text that changes with the file: its ETag's hash or its modification time; "" if the store gives no ETag."""
    if storage.is_remote(url):
        return f"{tags[url]:016x}" if url in tags else ""
    return str(os.stat(storage.local_path(url)).st_mtime_ns)


def _scan(
    content: IndexContent,
    todo: Sequence[tuple[str, str, int, str]],
    jobs: int,
    progress: Progress | None,
    folder: str,
    part_seconds: float,
    parts: list[str],
) -> tuple[dict[str, str], int]:
    """Scan shards into `content`; returns problems by URL and the samples scanned. Appends the parts written."""
    problems: dict[str, str] = {}
    unsaved: list[ScannedShard] = []
    sizes = {url: size for url, _, size, _ in todo}
    samples = done_bytes = unsaved_bytes = 0
    last = time.monotonic()
    for done, shard in enumerate(map_shards(scan_shard, todo, jobs), 1):
        done_bytes += sizes[shard.url]
        if shard.record is None:
            problems[shard.url] = shard.problem
        else:
            content.add(shard.record, shard.block)
            samples += shard.record.count
            unsaved.append(shard)
            unsaved_bytes += len(shard.block)
        is_late = time.monotonic() - last >= part_seconds
        if unsaved and done < len(todo) and (is_late or unsaved_bytes >= MAX_PART_BYTES):
            parts.append(write_part(folder, unsaved))
            unsaved, unsaved_bytes, last = [], 0, time.monotonic()
        if progress is not None:
            progress(done, len(todo), samples, done_bytes)
    if problems and unsaved:
        parts.append(write_part(folder, unsaved))
    return problems, samples


def _check_counts(
    stats: dict[str, dict[str, Any]],
    others: dict[str, Count],
    urls: Sequence[str],
    paths: Sequence[str],
    content: IndexContent,
    problems: dict[str, str],
) -> None:
    """Add to `problems` the shards that do not hold as many samples as a file beside them says.

    stats: content of `_stats.json` by URL; others: counts in the index files of other tools, by URL
    """
    of_stats = {url: Count(each["successes"], stats_url(url)) for url, each in stats.items()}
    for url, below in zip(urls, paths, strict=True):
        for stated in (of_stats.get(url), others.get(url)):
            if stated is not None and below in content.records and url not in problems:
                expected, found = stated.samples, content.records[below].count
                if expected != found:
                    problems[url] = str(wrong_count_error(url, expected, found, stated.where))


def _open_quietly(root: str, path: str) -> Manifest:
    """The indexed source; the caller of `build_index` prints what it leaves out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftOutWarning)
        return open_source(os.path.basename(root) or root, path)


def _problems_error(path: str, root: str, problems: dict[str, str], shards: int) -> UserError:
    """One error about all tars in `problems`: the messages of the first ones, the names of the others."""
    messages = list(problems.values())
    if len(problems) == 1 and shards == 1:
        return UserError(messages[0])
    first = "; ".join(messages[:MAX_LISTED_PROBLEMS])
    others = list(problems)[MAX_LISTED_PROBLEMS:]
    more = f"; and {len(others):,} more: {storage.listed(paths_below(root, others))}" if others else ""
    return UserError(
        f"{len(problems)} of the {shards} tars of {path} cannot be indexed: {first}{more}. Make these again "
        f"or remove them, then run: dromos data index {root}; the others are saved in "
        f"{storage.join(root, INDEX_FOLDER)}/{PARTS_FOLDER} and will not be scanned again"
    )


def _index_order(path: str, root: str, paths: list[str], content: IndexContent) -> list[str]:
    """Paths of the new index: all shards of a folder; for a pattern or one tar, also the other shards of the index."""
    if not (storage.is_pattern(path) or path.endswith(storage.SHARD_SUFFIX)):
        return paths
    load_index(content, root, skip=set(paths))  # another run may have indexed other shards meanwhile
    others = sorted(set(content.records) - set(paths))
    return paths + [other for other in others if storage.exists(storage.join(root, other))]


@dataclass(frozen=True)
class Findings:
    """Suspicious shards.

    duplicates: groups of shard paths with the same samples
    split: shard path -> keys whose members are not adjacent
    """

    duplicates: list[list[str]]
    split: dict[str, list[str]]


def compare_shards(root: str, records: Sequence[ShardRecord]) -> Findings:
    """Find duplicate shards and split samples.

    Equal headers do not prove that two shards are equal, because two shards can have the same keys and member sizes but
    different content. So some byte ranges of the content are compared too.
    """
    same_headers: dict[tuple[str, int], list[ShardRecord]] = defaultdict(list)
    for record in records:
        if record.count:
            same_headers[record.fingerprint, record.size].append(record)
    duplicates = []
    for group in same_headers.values():
        if len(group) > 1:
            by_content: dict[int, list[str]] = defaultdict(list)
            for record in group:
                by_content[_content_hash(storage.join(root, record.path), record.size)].append(record.path)
            duplicates += [paths for paths in by_content.values() if len(paths) > 1]
    split = {record.path: json.loads(record.split) for record in records if record.split != "[]"}
    return Findings(duplicates, split)


def _content_hash(url: str, size: int) -> int:
    """Hash of COMPARED_RANGES byte ranges of a shard: the first, the last and those between."""
    state = xxhash.xxh64()
    for number in range(COMPARED_RANGES):
        start = (size - min(size, COMPARED_BYTES)) * number // (COMPARED_RANGES - 1)
        state.update(storage.read_range(url, start, min(COMPARED_BYTES, size - start)))
    return state.intdigest()
