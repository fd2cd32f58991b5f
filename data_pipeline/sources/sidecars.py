"""Sample counts from the index files of other tools, so that training can start without scanning the tars.

Supported: `.idx` of DALI's wds2idx, `.tar.idx` and `.nv-meta/.info.json` of Megatron-Energon, the JSON index of wids.
Only counts are used, and each is compared with the tar when the tar is first read. Offsets are ignored: a wrong offset
can point to another sample, and verifying offsets needs the scan of the headers that they would save.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeGuard

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.sources.tar_members import TAR_BLOCK_BYTES

INDEX_SUFFIXES = (".tar.idx", ".idx")
ENERGON_INFO = ".nv-meta/.info.json"
HEAD_BYTES = 64  # enough to tell the kinds of .idx apart, and to read DALI's count
DALI_HEAD = re.compile(rb"v1\.[12] (\d+)\s")
# JSON files of a folder that may be a wids index, which takes about 150 bytes per shard.
MAX_WIDS_FILES, MAX_WIDS_BYTES = 8, 64 << 20
PARALLEL_READS = 16


class Count(NamedTuple):
    """Samples of a shard according to the file `where`."""

    samples: int
    where: str


def count_samples(root: str, urls: Sequence[str], sizes: dict[str, int]) -> dict[str, int]:
    """Shard URL -> samples, as `read_counts`."""
    return {url: count.samples for url, count in read_counts(root, urls, sizes).items()}


def read_counts(root: str, urls: Sequence[str], sizes: dict[str, int]) -> dict[str, Count]:
    """Shard URL -> count, for the shards that an index file of another tool covers; `sizes` are bytes by URL.

    Warns about files that are damaged or do not match their tars, and ignores them.
    """
    counts: dict[str, Count] = {}
    for listed in (_energon_info(root, urls), _wids(root, urls, sizes)):
        counts |= {url: count for url, count in listed.items() if url not in counts}
    index_files = _index_files([url for url in urls if url not in counts])
    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        read = pool.map(lambda item: _count_in(*item), index_files.values())
        for (url, (where, _)), samples in zip(index_files.items(), read, strict=True):
            if samples is not None:
                counts[url] = Count(samples, where)
    for url in [url for url, count in counts.items() if count.samples > sizes[url] // TAR_BLOCK_BYTES]:
        _warn(
            url,
            f"an index file says {counts.pop(url).samples} samples, more than fit into the {sizes[url]} bytes of the "
            "tar",
        )
    return counts


def _warn(where: str, error: object) -> None:
    warnings.warn(
        f"{where}: {error}. The samples are counted from the tars instead; make the index file again",
        stacklevel=4,
    )


def _index_files(urls: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Shard URL -> (URL, bytes) of the index file beside it, for the shards that have one."""
    candidates = {url: [url.removesuffix(".tar") + suffix for suffix in INDEX_SUFFIXES] for url in urls}
    existing = storage.sizes([name for names in candidates.values() for name in names])
    return {
        url: (name, existing[name])
        for url, names in candidates.items()
        for name in reversed(names)
        if name in existing
    }


def _count_in(where: str, size: int) -> int | None:
    """Samples according to an index file of DALI (text with a count) or Energon (uint64 offsets); None if neither."""
    head = storage.read_range(where, 0, min(size, HEAD_BYTES))
    match = DALI_HEAD.match(head)
    if match:
        return int(match[1])
    if size % 8 or size < 16 or head.startswith(b"v"):
        _warn(where, "it is neither an index of DALI nor of Energon")
        return None
    return size // 8 - 1


def _energon_info(root: str, urls: Sequence[str]) -> dict[str, Count]:
    """Counts in Energon's `.info.json` of the folder or of its parent, whose paths start with the folder's name."""
    above, _, folder = root.rpartition("/")
    for base, start in ((root, ""), (above, f"{folder}/")):
        where = storage.join(base, ENERGON_INFO)
        if not base or not storage.exists(where):
            continue
        counts = _json(where).get("shard_counts")
        if not isinstance(counts, dict):
            _warn(where, "it has no shard_counts")
            continue
        found: dict[str, Count] = {}
        for url in urls:
            count = counts.get(start + storage.path_below(root, url))
            if _is_count(count):
                found[url] = Count(count, where)
        if found:
            return found
    return {}


def _wids(root: str, urls: Sequence[str], sizes: dict[str, int]) -> dict[str, Count]:
    """Counts in a wids index in the folder: JSON with a `shardlist` of {url, nsamples, filesize}."""
    try:
        names = storage.list_files(root, ".json")
    except UserError:
        return {}
    lengths = storage.sizes([name for name in names if not name.endswith("_stats.json")])
    names = [name for name, length in lengths.items() if length <= MAX_WIDS_BYTES]
    by_path = {storage.path_below(root, url): url for url in urls}
    for where in names[:MAX_WIDS_FILES]:
        shards = _json(where).get("shardlist")
        if not isinstance(shards, list):
            continue
        shards = [shard for shard in shards if isinstance(shard, dict)]
        bases = Counter(str(shard.get("url", "")).rpartition("/")[2] for shard in shards)
        found: dict[str, Count] = {}
        for shard in shards:
            url = _shard_of(str(shard.get("url", "")), by_path, bases)
            if url is None or not _is_count(shard.get("nsamples")):
                continue
            if shard.get("filesize", sizes[url]) != sizes[url]:
                _warn(where, f"it says that {url} has {shard['filesize']} bytes, but it has {sizes[url]}")
                continue
            found[url] = Count(shard["nsamples"], where)
        if found:
            return found
    return {}


def _shard_of(listed: str, by_path: dict[str, str], bases: Counter[str]) -> str | None:
    """URL of the shard that a wids index calls `listed`: a path below its folder, or an address elsewhere.

    `by_path` maps the path of a shard below the folder to its URL. Of an address elsewhere, the longest end that is
    such a path decides; its last part alone only if it is no other shard's of the list.
    """
    parts = [part for part in listed.split("/") if part not in ("", ".")]
    for start in range(len(parts)):
        url = by_path.get("/".join(parts[start:]))
        if url is not None:
            is_base = start == len(parts) - 1 and start > 0
            return None if is_base and bases[parts[-1]] > 1 else url
    return None


def _json(where: str) -> dict[str, Any]:
    """Content of a JSON file; an empty dict if it is no JSON object."""
    try:
        content = json.loads(storage.read_bytes(where))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
