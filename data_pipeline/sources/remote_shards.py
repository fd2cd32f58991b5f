"""Samples of tars in an object store: from the node's cache by whole units, or one by one while that is faster."""

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
from data_pipeline.sources.scan import locate
from data_pipeline.sources.tar import TAR_BLOCK_BYTES
from data_pipeline.storage.cache import ByteRange, Cache, CacheSettings
from data_pipeline.storage.cache_cleanup import OFFSETS_PREFIX
from data_pipeline.storage.cached_ranges import fetch, read_direct, read_pieces

REMEMBERED = 1 << 16  # units whose bytes were looked up
FETCHED = 2  # whole tars kept in memory where there is no cache
PARALLEL_READS = 16
Place = tuple[int, int]
"""Shard, and position in its tar."""


class RemoteShards:
    """Reads the shards of one source. One a process: it keeps files of the cache open.

    Without a cache every sample is a GET of its own.
    """

    def __init__(self, manifest: Manifest, offsets: Offsets, cache: CacheSettings | None) -> None:
        self.manifest = manifest
        self.cache = Cache(cache) if cache is not None else None
        self.units = Units(manifest, offsets, cache.limit_bytes if cache is not None else 0)
        self._parts: dict[tuple[int, int], ByteRange] = {}
        self._fetched: OrderedDict[int, bytes] = OrderedDict()
        self._warned = False
        self._ahead = ReadAhead(self._alone)

    def expect(self, shards: Sequence[int], indices: Sequence[int]) -> None:
        """The samples that will be read next: those that will be fetched by themselves are, several at once."""
        if self.cache is not None and not self.cache.off and not self.cache.warming():
            return
        places = zip(shards, indices, strict=True)
        self._ahead.expect(place for place in places if self._is_alone(*place))

    def span(self, shard: int, index: int, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a shard: those of the sample at position `index` of the tar.

        Raises UserError, ReadError as storage.read_range does.
        """
        if shard in self._fetched:
            return self._fetched[shard][start:stop]
        if self.cache is not None and not self.cache.off:
            found = self._cached(self.cache, shard, index, start, stop)
            if found is not None:
                return found
        found = self._ahead.take((shard, index))
        return found if found is not None else self._get(shard, start, stop)

    def located(self, shard: int) -> np.ndarray:
        """Where a shard's samples begin, as Offsets.learn takes it, from the tar itself: fetched whole once a node."""
        if self.cache is not None and not self.cache.off:
            return self._located_by_cache(self.cache, shard)
        if shard not in self._fetched:
            self._fetched[shard] = b"".join(self._pieces(shard, 0, int(self.manifest.sizes[shard])))
            if len(self._fetched) > FETCHED:
                self._fetched.popitem(last=False)
        return locate(self._fetched[shard], self.manifest.url(shard))

    def forget(self) -> None:
        """Close files and drop fetched bytes."""
        self._fetched.clear()
        self._ahead.close()
        if self.cache is not None:
            self.cache.close_files()

    def _is_alone(self, shard: int, index: int) -> bool:
        if shard in self._fetched or not self.units.knows(shard):
            return False
        return self.cache is None or not self.cache.has(self._unit(shard, index))

    def _alone(self, shard: int, index: int) -> bytes:
        assert self.units.offsets is not None
        return self._get(shard, *self.units.offsets.range(shard, index))

    def _cached(self, cache: Cache, shard: int, index: int, start: int, stop: int) -> bytes | None:
        unit = self._unit(shard, index)
        found = cache.read(unit, start, stop)
        if found is None and self.manifest.offsets is None:
            found = cache.read(self._whole(shard), start, stop)
        if found is None and not cache.warming():
            fetch(cache, unit)
            found = cache.read(unit, start, stop)
        return found

    def _unit(self, shard: int, index: int) -> ByteRange:
        number = (self.units.first.item(shard) + self._kept(shard, index)) // self.units.length
        found = self._parts.get((shard, number))
        if found is None:
            if len(self._parts) == REMEMBERED:
                self._parts.clear()
            low, high = self.units.ranges(np.array([shard]), np.array([number]))
            found = self._parts[shard, number] = self.units.part(shard, int(low[0]), int(high[0]))
        return found

    def _kept(self, shard: int, index: int) -> int:
        """Index in the manifest of the sample at a position of the tar: another where a view leaves samples out."""
        if self.manifest.kept is None:
            return index
        samples = range(int(self.manifest.counts[shard]))
        return bisect_left(samples, index, key=partial(self.manifest.position, shard))

    def _whole(self, shard: int) -> ByteRange:
        return self.units.part(shard, 0, int(self.manifest.sizes[shard]))

    def _located_by_cache(self, cache: Cache, shard: int) -> np.ndarray:
        whole = self._whole(shard)
        known = os.path.join(cache.settings.folder, f"{OFFSETS_PREFIX}{whole.name}")
        starts = _read_starts(known)
        if starts is not None:
            return starts
        self._warn_if_too_large(cache)
        starts = None
        if cache.ensure(whole, partial(self._pieces, shard, 0, whole.stop)):
            with suppress(FileNotFoundError):  # the cache may have needed the room already
                starts = locate(cache.path(whole), whole.url)
        if starts is None:
            starts = locate(b"".join(self._pieces(shard, 0, whole.stop)), whole.url)
        with suppress(OSError):
            _write_starts(known, starts)
        return starts

    def _warn_if_too_large(self, cache: Cache) -> None:
        if not self._warned and self.manifest.sizes.sum() > cache.settings.limit_bytes:
            self._warned = True
            warnings.warn(
                f"source {self.manifest.name!r} has no index and is larger than the cache ({self.manifest.sizes.sum()} "
                f"bytes, limit {cache.settings.limit_bytes}), so its tars are fetched whole to find their samples; "
                f"run: dromos data index {self.manifest.root}",
                stacklevel=4,
            )

    def _pieces(self, shard: int, start: int, stop: int) -> Iterator[bytes]:
        return read_pieces(self.units.part(shard, start, stop))

    def _get(self, shard: int, start: int, stop: int) -> bytes:
        return read_direct(self.units.part(shard, start, stop))


def _write_starts(path: str, starts: np.ndarray) -> None:
    """Offsets outlive a restart of the machine, so they carry a hash."""
    content = (starts // TAR_BLOCK_BYTES).astype("<u4").tobytes()
    storage.publish(path, content + xxhash.xxh64_digest(content))


def _read_starts(path: str) -> np.ndarray | None:
    try:
        data = storage.read_bytes(path)
        os.utime(path)  # what is asked for is kept
    except OSError:
        return None
    content = data[:-8]
    if len(content) % 4 or not content or data[-8:] != xxhash.xxh64_digest(content):
        return None
    return np.frombuffer(content, "<u4").astype(np.int64) * TAR_BLOCK_BYTES


class ReadAhead:
    """Reads places in the order in which they will be asked for, never more than PARALLEL_READS ahead."""

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self._read = read
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: deque[Place] = deque()
        self._begun: dict[Place, Future[bytes]] = {}

    def expect(self, places: Iterable[Place]) -> None:
        """These will be asked for next, in this order; what was expected before will not."""
        self.forget()
        self._waiting.extend(dict.fromkeys(places))

    def take(self, place: Place) -> bytes | None:
        """What was read, or what its reading raised; None for a place that nobody expected."""
        if not self._waiting and place not in self._begun:
            return None
        if self._pool is None:
            self._pool = ThreadPoolExecutor(PARALLEL_READS, "dromos-read")
        while self._waiting and len(self._begun) < PARALLEL_READS:
            following = self._waiting.popleft()
            self._begun[following] = self._pool.submit(self._read, *following)
        future = self._begun.pop(place, None)
        return None if future is None else future.result()

    def forget(self) -> None:
        """Expect nothing any more."""
        self._waiting.clear()
        for future in self._begun.values():
            future.cancel()
        self._begun.clear()

    def close(self) -> None:
        """End its threads."""
        self.forget()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
