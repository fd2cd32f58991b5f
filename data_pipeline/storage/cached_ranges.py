"""Fetches byte ranges and whole objects through the node cache."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from data_pipeline import storage
from data_pipeline.storage.cache import ByteRange, Cache, CacheSettings
from data_pipeline.storage.object_store import RANGE_BYTES

PARALLEL_RANGES = 4  # pieces of one tar on their way


def local_copy(settings: CacheSettings, url: str) -> str | None:
    """Path of an object that never changes, whole in the node's cache; None where that cannot be used."""
    size = storage.size(url)
    whole = ByteRange(url, size, 0, 0, size)
    cache = Cache(settings)
    return cache.path(whole) if cache.has(whole) or fetch(cache, whole) else None


def fetch(cache: Cache, part: ByteRange) -> bool:
    """Have a range in the cache, see Cache.ensure."""
    return cache.ensure(part, partial(pieces, part))


def pieces(part: ByteRange) -> Iterator[bytes]:
    """A range from the object store, in ranges of 8 to 16 MiB where it is larger, in order."""
    count = max(1, -(-(part.stop - part.start) // RANGE_BYTES))
    cuts = [part.start + (part.stop - part.start) * i // count for i in range(count + 1)]
    if count == 1:
        yield _read(part)
        return
    with ThreadPoolExecutor(PARALLEL_RANGES) as pool:
        for low in range(0, count, PARALLEL_RANGES):
            few = [replace(part, start=a, stop=b) for a, b in zip(cuts[low:-1], cuts[low + 1 :], strict=True)]
            yield from pool.map(_read, few[:PARALLEL_RANGES])


def _read(part: ByteRange) -> bytes:
    return storage.read_range(part.url, part.start, part.stop - part.start, part.size, part.version)
