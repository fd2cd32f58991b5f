"""Fetches byte ranges and whole objects through the node cache."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from data_pipeline import storage
from data_pipeline.storage.cache import ByteRange, Cache, CacheSettings
from data_pipeline.storage.object_store import RANGE_BYTES

PARALLEL_REQUESTS = 4  # requests in flight for one large range


def local_copy(settings: CacheSettings, url: str) -> str | None:
    """Path of a cached copy of an immutable object; None if the cache is unusable."""
    size = storage.size(url)
    whole = ByteRange(url, size, 0, 0, size)
    cache = Cache(settings)
    return cache.path(whole) if cache.has(whole) or fetch(cache, whole) else None


def fetch(cache: Cache, byte_range: ByteRange) -> bool:
    """Download a range into the cache unless it is there; returns and raises as Cache.ensure does."""
    return cache.ensure(byte_range, partial(read_chunks, byte_range))


def read_chunks(byte_range: ByteRange) -> Iterator[bytes]:
    """Read a range from the object store, bypassing the cache; a large one in chunks of 8 to 16 MiB, in order."""
    count = max(1, -(-(byte_range.stop - byte_range.start) // RANGE_BYTES))
    cuts = [byte_range.start + (byte_range.stop - byte_range.start) * i // count for i in range(count + 1)]
    if count == 1:
        yield read_direct(byte_range)
        return
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        for low in range(0, count, PARALLEL_REQUESTS):
            chunks = [
                replace(byte_range, start=start, stop=stop)
                for start, stop in zip(cuts[low:-1], cuts[low + 1 :], strict=True)
            ]
            yield from pool.map(read_direct, chunks[:PARALLEL_REQUESTS])


def read_direct(byte_range: ByteRange) -> bytes:
    """Read a range from the object store, bypassing the cache. Raises as storage.read_range does."""
    length = byte_range.stop - byte_range.start
    return storage.read_range(byte_range.url, byte_range.start, length, byte_range.size, byte_range.version)
