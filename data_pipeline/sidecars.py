"""What other tools wrote beside tars: how many samples each holds, and where, so that no tar need be walked first.

Read are `.idx` of DALI's wds2idx (v1.1, v1.2), `.tar.idx` and `.nv-meta/.info.json` of Megatron-Energon, and the JSON
index of wids. They can be older than the tars: counts are held against what is read, and starts are used only if
samples are found there; else the tar itself is walked.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.tar import BLOCK, members_of, split_name

SUFFIXES = (".tar.idx", ".idx")
INFO = ".nv-meta/.info.json"
HEAD = 64  # bytes that tell which kind of .idx a file is, and DALI's count
DALI = re.compile(rb"v1\.[12] (\d+)\s")
WIDS_FILES = 8  # JSON files of a folder that are looked at
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
    return found


def starts(url: str, size: int, samples: int) -> np.ndarray | None:
    """int64 [samples + 1] as `offsets.pack_starts` takes it, by the index file beside a tar of `size` bytes; None if
    there is none, or what it says does not fit the tar."""
    beside = _index_files([url])
    if url not in beside:
        return None
    where, _ = beside[url]
    try:
        data = storage.read_bytes(where)
        found = _dali_starts(data) if DALI.match(data) else _energon_starts(data)
        if len(found) != samples + 1:
            raise ValueError(f"it lists {len(found) - 1} samples, {samples} are expected")
        _check(url, size, found)
    except (ValueError, FileNotFoundError) as error:
        _warn(where, error)
        return None
    return found


def _warn(where: str, error: object) -> None:
    warnings.warn(
        f"{where} does not fit its tar and is not used ({error}); the tar is read instead. Make it again or remove it",
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
            number = counts.get(start + storage.below(root, url))
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
    names = [name for name in names if not name.endswith("_stats.json")]
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
    except ValueError as error:
        _warn(where, f"it is no JSON: {error}")
        return {}
    return found if isinstance(found, dict) else {}


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _energon_starts(data: bytes) -> np.ndarray:
    """uint64 each: the first header of each sample, then the end."""
    if len(data) % 8 or len(data) < 16:
        raise ValueError(f"{len(data)} bytes are no array of 64-bit offsets")
    return np.frombuffer(data, "<u8").astype(np.int64)


def _dali_starts(data: bytes) -> np.ndarray:
    """Lines of `extension offset size name ...`, v1.1 without names: offsets are those of contents.

    A sample begins where what was before it ends, so that headers of long names are in its span.
    """
    text = data.decode("utf-8", "surrogateescape").splitlines()
    named = text[0].startswith("v1.2")
    found: list[int] = []
    end = 0
    last: object = None
    for number, line in enumerate(text[1:]):
        for offset, size, name in _entries(line, named):
            # wds2idx takes hidden files and files without extension for samples.
            parts = split_name(name) if named else (str(number), "")
            if parts is not None and parts[0] != last:
                found.append(end)
                last = parts[0]
            if offset < end + BLOCK or size < 0:
                raise ValueError(f"line {number + 2} goes back to byte {offset}")
            end = offset + -(-size // BLOCK) * BLOCK
    return np.array([*found, end], np.int64)


def _entries(line: str, named: bool) -> Iterator[tuple[int, int, str]]:
    words = line.split(" ")
    width = 4 if named else 3
    if len(words) % width:
        raise ValueError(
            f"{len(words)} words are not {width} a member; names with blanks cannot be told apart"
        )
    for at in range(0, len(words), width):
        yield int(words[at + 1]), int(words[at + 2]), words[at + 3] if named else ""


def _check(url: str, size: int, found: np.ndarray) -> None:
    """Raises ValueError unless the starts go up within the tar, and samples that differ are found at some of them."""
    if (found % BLOCK).any() or (np.diff(found) <= 0).any() or found[0] < 0 or found[-1] > size:
        raise ValueError("its offsets do not go up within the tar")
    samples = len(found) - 1
    keys: dict[int, str] = {}
    for index in sorted(
        {0, 1, samples // 2, samples // 2 + 1, samples - 2, samples - 1} & set(range(samples))
    ):
        start, stop = int(found[index]), int(found[index + 1])
        keys[index] = members_of(storage.read_range(url, start, stop - start), f"sample {index}").key
        if keys.get(index - 1) == keys[index]:
            raise ValueError(f"samples {index - 1} and {index} are pieces of one, {keys[index]!r}")
