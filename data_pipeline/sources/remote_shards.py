"""Reads samples of tars in an object store: from the node cache, or with one request per sample, sent ahead of use.

With a cache, whole fetch units are downloaded. Until the prefetcher has downloaded its first window (the cache is
warming), single samples are faster.
"""

from __future__ import annotations

import os
import warnings
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import numpy as np
import xxhash

from data_pipeline import storage
from data_pipeline.sources.fetch_units import Units
from data_pipeline.sources.manifest import Manifest
from data_pipeline.sources.offsets import Offsets
from data_pipeline.sources.scan import sample_starts
from data_pipeline.sources.tar_members import TAR_BLOCK_BYTES
from data_pipeline.storage.cache import ByteRange, Cache, CacheSettings
from data_pipeline.storage.cache_cleanup import OFFSETS_PREFIX
from data_pipeline.storage.cached_ranges import fetch, read_chunks, read_direct

MAX_KNOWN_UNITS = 1 << 16  # units whose byte range is kept in memory
MAX_TARS_IN_MEMORY = 2  # whole tars kept in memory when there is no cache
PARALLEL_READS = 16
Location = tuple[int, int]  # of a sample: shard, position in its tar


class RemoteShards:
    """Reads the shards of one source. One per process, because it keeps cache files open.

    Without a cache, every sample is one GET.
    """

    def __init__(self, manifest: Manifest, offsets: Offsets, cache: CacheSettings | None) -> None:
        self.manifest = manifest
        self.cache = Cache(cache) if cache is not None else None
        self.units = Units(manifest, offsets, cache.limit_bytes if cache is not None else 0)
        self._unit_ranges: dict[tuple[int, int], ByteRange] = {}
        self._tars: OrderedDict[int, bytes] = OrderedDict()
        self._warned = False
        self._ahead = ReadAhead(self._read_sample)

    def expect(self, shards: Sequence[int], indices: Sequence[int]) -> None:
        """Announce the samples that are read next, in order; those that need a GET each are read in parallel."""
        if self.cache is not None and not self.cache.off and not self.cache.warming():
            return
        locations = zip(shards, indices, strict=True)
        self._ahead.expect(location for location in locations if self._is_uncached(*location))

    def span(self, shard: int, index: int, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a shard, which are the sample at position `index` of the tar.

        Raises as storage.read_range does.
        """
        if shard in self._tars:
            return self._tars[shard][start:stop]
        if self.cache is not None and not self.cache.off:
            found = self._cached(self.cache, shard, index, start, stop)
            if found is not None:
                return found
        found = self._ahead.take((shard, index))
        return found if found is not None else self._get(shard, start, stop)

    def sample_starts(self, shard: int) -> np.ndarray:
        """`Scan.starts` of a shard without an index. Each node fetches the whole tar once for it."""
        if self.cache is not None and not self.cache.off:
            return self._cached_starts(self.cache, shard)
        if shard not in self._tars:
            self._tars[shard] = b"".join(self._chunks(shard, 0, int(self.manifest.sizes[shard])))
            if len(self._tars) > MAX_TARS_IN_MEMORY:
                self._tars.popitem(last=False)
        return sample_starts(self._tars[shard], self.manifest.url(shard))

    def close(self) -> None:
        """Close files and drop fetched bytes, which may be stale."""
        self._tars.clear()
        self._ahead.close()
        if self.cache is not None:
            self.cache.close_files()

    def _is_uncached(self, shard: int, index: int) -> bool:
        """True if the sample needs a GET of its own."""
        if shard in self._tars or not self.units.has_offsets(shard):
            return False
        return self.cache is None or not self.cache.has(self._unit(shard, index))

    def _read_sample(self, shard: int, index: int) -> bytes:
        assert self.units.offsets is not None
        return self._get(shard, *self.units.offsets.range(shard, index))

    def _cached(self, cache: Cache, shard: int, index: int, start: int, stop: int) -> bytes | None:
        """Read from the cache, downloading the sample's unit if needed; None while the cache is warming or failing."""
        unit = self._unit(shard, index)
        found = cache.read(unit, start, stop)
        if found is None and self.manifest.offsets is None:
            found = cache.read(self._whole(shard), start, stop)
        if found is None and not cache.warming():
            fetch(cache, unit)
            found = cache.read(unit, start, stop)
        return found

    def _unit(self, shard: int, index: int) -> ByteRange:
        """Byte range of the unit of a sample, cut at the shard's end."""
        number = (self.units.first.item(shard) + self._manifest_index(shard, index)) // self.units.length
        found = self._unit_ranges.get((shard, number))
        if found is None:
            if len(self._unit_ranges) == MAX_KNOWN_UNITS:
                self._unit_ranges.clear()
            low, high = self.units.ranges(np.array([shard]), np.array([number]))
            found = self._unit_ranges[shard, number] = self.units.byte_range(shard, int(low[0]), int(high[0]))
        return found

    def _manifest_index(self, shard: int, index: int) -> int:
        """Manifest index of the sample at position `index` of the tar; the two differ if a view leaves samples out."""
        if self.manifest.kept is None:
            return index
        samples = range(int(self.manifest.counts[shard]))
        return bisect_left(samples, index, key=partial(self.manifest.tar_position, shard))

    def _whole(self, shard: int) -> ByteRange:
        return self.units.byte_range(shard, 0, int(self.manifest.sizes[shard]))

    def _cached_starts(self, cache: Cache, shard: int) -> np.ndarray:
        """`sample_starts` from a file in the cache folder, else from the tar in the cache or in memory."""
        whole = self._whole(shard)
        offsets_path = os.path.join(cache.settings.folder, f"{OFFSETS_PREFIX}{whole.name}")
        starts = _read_starts(offsets_path)
        if starts is not None:
            return starts
        self._warn_if_too_large(cache)
        starts = None
        if cache.ensure(whole, partial(self._chunks, shard, 0, whole.stop)):
            with suppress(FileNotFoundError):  # the cache may have evicted it meanwhile
                starts = sample_starts(cache.path(whole), whole.url)
        if starts is None:
            starts = sample_starts(b"".join(self._chunks(shard, 0, whole.stop)), whole.url)
        with suppress(OSError):
            _write_starts(offsets_path, starts)
        return starts

    def _warn_if_too_large(self, cache: Cache) -> None:
        if not self._warned and self.manifest.sizes.sum() > cache.settings.limit_bytes:
            self._warned = True
            warnings.warn(
                f"source {self.manifest.name!r} has no index and is larger than the cache ({self.manifest.sizes.sum()} "
                f"bytes, limit {cache.settings.limit_bytes}), so whole tars are fetched to find their samples; "
                f"run: dromos data index {self.manifest.root}",
                stacklevel=4,
            )

    def _chunks(self, shard: int, start: int, stop: int) -> Iterator[bytes]:
        return read_chunks(self.units.byte_range(shard, start, stop))

    def _get(self, shard: int, start: int, stop: int) -> bytes:
        return read_direct(self.units.byte_range(shard, start, stop))


def _write_starts(path: str, starts: np.ndarray) -> None:
    """Write starts with a hash: unlike ranges they are kept after a reboot, and a power failure can damage them."""
    content = (starts // TAR_BLOCK_BYTES).astype("<u4").tobytes()
    storage.publish(path, content + xxhash.xxh64_digest(content))


def _read_starts(path: str) -> np.ndarray | None:
    """Read starts; None if the file is missing or damaged."""
    try:
        data = storage.read_bytes(path)
        os.utime(path)  # the cleanup removes files by time of last use
    except OSError:
        return None
    content = data[:-8]
    if len(content) % 4 or not content or data[-8:] != xxhash.xxh64_digest(content):
        return None
    return np.frombuffer(content, "<u4").astype(np.int64) * TAR_BLOCK_BYTES


class ReadAhead:
    """Reads samples in parallel in the order of their later use, at most PARALLEL_READS ahead."""

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self._read = read
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: deque[Location] = deque()
        self._in_flight: dict[Location, Future[bytes]] = {}

    def expect(self, locations: Iterable[Location]) -> None:
        """Announce the samples that are taken next, in order; replaces earlier announcements."""
        self.cancel()
        self._waiting.extend(dict.fromkeys(locations))

    def take(self, location: Location) -> bytes | None:
        """Content of a sample; raises what its read raised; None for a sample that was not announced."""
        if not self._waiting and location not in self._in_flight:
            return None
        if self._pool is None:
            self._pool = ThreadPoolExecutor(PARALLEL_READS, "dromos-read")
        while self._waiting and len(self._in_flight) < PARALLEL_READS:
            following = self._waiting.popleft()
            self._in_flight[following] = self._pool.submit(self._read, *following)
        future = self._in_flight.pop(location, None)
        return None if future is None else future.result()

    def cancel(self) -> None:
        """Drop all announced samples."""
        self._waiting.clear()
        for future in self._in_flight.values():
            future.cancel()
        self._in_flight.clear()

    def close(self) -> None:
        """End the threads."""
        self.cancel()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
