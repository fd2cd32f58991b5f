"""What other tools wrote beside tars: how many samples each holds, so that no tar need be walked before training.

Read are `.idx` of DALI's wds2idx, `.tar.idx` and `.nv-meta/.info.json` of Megatron-Energon, and the JSON index of wids.
Only counts are taken, and held against the tar when it is first read: an offset that is wrong can lead to another
sample than the one meant, and to prove the offsets takes the very walk over the headers that they would spare.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeGuard

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.sources.tar import TAR_BLOCK_BYTES

SUFFIXES = (".tar.idx", ".idx")
INFO = ".nv-meta/.info.json"
HEAD = 64  # bytes that tell which kind of .idx a file is, and DALI's count
DALI = re.compile(rb"v1\.[12] (\d+)\s")
# JSON files of a folder that are looked at, and their bytes: a wids index takes some 150 a shard.
WIDS_FILES, WIDS_BYTES = 8, 64 << 20
SIDE_BY_SIDE = 16


def count(root: str, urls: Sequence[str], sizes: dict[str, int]) -> dict[str, int]:
    """Shard url -> samples, for the shards of which something beside them tells it."""
    found: dict[str, int] = {}
    for listed in (_energon_info(root, urls), _wids(root, urls, sizes)):
        found |= {url: number for url, number in listed.items() if url not in found}
    left = [url for url in urls if url not in found]
    beside = _index_files(left)
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        counts = pool.map(lambda item: _count_in(*item), beside.values())
        found |= {url: number for url, number in zip(beside, counts, strict=True) if number is not None}
    for url in [url for url, number in found.items() if number > sizes[url] // TAR_BLOCK_BYTES]:
        _warn(url, f"{found.pop(url)} samples are told of it, and it has {sizes[url]} bytes")
    return found


def _warn(where: str, error: object) -> None:
    warnings.warn(
        f"{where}: {error}. What other tools wrote is not used here, the tars are counted; make it again",
        stacklevel=4,
    )


def _index_files(urls: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Shard url -> (url, bytes) of the index file beside it."""
    candidates = {url: [url.removesuffix(".tar") + suffix for suffix in SUFFIXES] for url in urls}
    there = storage.sizes([name for names in candidates.values() for name in names])
    return {
        url: (name, there[name])
        for url, names in candidates.items()
        for name in reversed(names)
        if name in there
    }


def _count_in(where: str, size: int) -> int | None:
    head = storage.read_range(where, 0, min(size, HEAD))
    match = DALI.match(head)
    if match:
        return int(match[1])
    if size % 8 or size < 16 or head.startswith(b"v"):
        _warn(where, "it is of no kind that is known")
        return None
    return size // 8 - 1


def _energon_info(root: str, urls: Sequence[str]) -> dict[str, int]:
    """Counts in `.nv-meta/.info.json` of the folder, or of the one above it, where the paths begin with the folder."""
    above, _, folder = root.rpartition("/")
    for base, start in ((root, ""), (above, f"{folder}/")):
        where = storage.join(base, INFO)
        if not base or not storage.exists(where):
            continue
        counts = _json(where).get("shard_counts")
        if not isinstance(counts, dict):
            _warn(where, "it has no shard_counts")
            continue
        found: dict[str, int] = {}
        for url in urls:
            number = counts.get(start + storage.path_below(root, url))
            if _is_count(number):
                found[url] = number
        if found:
            return found
    return {}


def _wids(root: str, urls: Sequence[str], sizes: dict[str, int]) -> dict[str, int]:
    """Counts in a wids index in the folder: a JSON object with a `shardlist` of {url, nsamples, filesize}."""
    try:
        names = storage.list_files(root, ".json")
    except UserError:
        return {}
    lengths = storage.sizes([name for name in names if not name.endswith("_stats.json")])
    names = [name for name, length in lengths.items() if length <= WIDS_BYTES]
    by_name = {url.rpartition("/")[2]: url for url in urls}
    for where in names[:WIDS_FILES]:
        shards = _json(where).get("shardlist")
        if not isinstance(shards, list):
            continue
        found: dict[str, int] = {}
        for shard in shards:
            url = (
                by_name.get(str(shard.get("url", "")).rpartition("/")[2]) if isinstance(shard, dict) else None
            )
            if url is None or not _is_count(shard.get("nsamples")):
                continue
            if shard.get("filesize", sizes[url]) != sizes[url]:
                _warn(where, f"{url} has {sizes[url]} bytes, not {shard['filesize']}")
                continue
            found[url] = shard["nsamples"]
        if found:
            return found
    return {}


def _json(where: str) -> dict[str, Any]:
    try:
        found = json.loads(storage.read_bytes(where))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_count(number: object) -> TypeGuard[int]:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0
