"""Samples of tars in an object store: from the node's cache by whole units, or one by one while that is faster."""

from __future__ import annotations

import os
import warnings
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import xxhash

from data_pipeline import storage
from data_pipeline.order.source_order import run_length
from data_pipeline.sources.manifest import Manifest
from data_pipeline.sources.offsets import Offsets
from data_pipeline.sources.read_ahead import ReadAhead
from data_pipeline.sources.scan import locate
from data_pipeline.sources.tar import BLOCK
from data_pipeline.storage.cache import ByteRange, Cache, CacheSettings
from data_pipeline.storage.cache_cleanup import LOCATED
from data_pipeline.storage.object_store import PIECE

UNIT_BYTES = 8 << 20
COMFORTABLY = (
    4  # a source takes at most a fourth of the cache's limit to be read in units larger than its runs
)
REMEMBERED = 1 << 16  # units whose bytes were looked up
FETCHED = 2  # whole tars kept in memory where there is no cache
AT_ONCE = 4  # pieces of one tar on their way


class Units:
    """A source's samples in the pieces that are fetched and cached: whole runs of neighbours, cut at shard edges.

    A small source has short runs, and would cost a GET a sample; where all of it has room in the cache, a unit is as
    many neighbouring runs as make about 8 MiB.
    """

    def __init__(self, manifest: Manifest, offsets: Offsets | None, limit_bytes: int) -> None:
        self.manifest = manifest
        self.offsets = offsets
        self.first = np.concatenate([[0], np.cumsum(manifest.counts, dtype=np.int64)])
        samples, size = int(self.first[-1]), int(manifest.sizes.sum())
        self.run = run_length(samples)
        self.length = self.run
        if self.run < run_length(1 << 62) and size <= limit_bytes // COMFORTABLY:
            self.length *= max(1, UNIT_BYTES * samples // max(1, self.run * size))

    def number(self, shards: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Unit of each sample; `indices` are those of the manifest. A unit may lie on both sides of a shard's edge."""
        return (self.first[shards] + indices) // self.length

    def ranges(self, shards: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(start, stop) in bytes of what lies of each unit in its shard. Raises KeyError as Offsets.ranges does."""
        assert self.offsets is not None
        low, high = self.samples(shards, units)
        start, _ = self.offsets.ranges(shards, self.manifest.in_tar(shards, low))
        _, stop = self.offsets.ranges(shards, self.manifest.in_tar(shards, high - 1))
        return start, stop

    def knows(self, shard: int) -> bool:
        """Are the places of the shard's samples known?"""
        return self.offsets is not None and self.offsets.knows(shard)

    def samples(self, shards: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices [low, high) of what lies of each unit in its shard."""
        low = np.maximum(units * self.length, self.first[shards]) - self.first[shards]
        high = np.minimum((units + 1) * self.length, self.first[shards + 1]) - self.first[shards]
        return low, high

    def part(self, shard: int, start: int, stop: int) -> ByteRange:
        """Bytes of a shard as the cache names them."""
        versions = self.manifest.versions
        version = 0 if versions is None else int(versions[shard])
        return ByteRange(self.manifest.url(shard), int(self.manifest.sizes[shard]), version, start, stop)


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
            self.cache.forget()

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
        known = os.path.join(cache.settings.folder, f"{LOCATED}{whole.name}")
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
        return pieces(self.units.part(shard, start, stop))

    def _get(self, shard: int, start: int, stop: int) -> bytes:
        return _read(self.units.part(shard, start, stop))


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
    count = max(1, -(-(part.stop - part.start) // PIECE))
    cuts = [part.start + (part.stop - part.start) * i // count for i in range(count + 1)]
    if count == 1:
        yield _read(part)
        return
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for low in range(0, count, AT_ONCE):
            few = [replace(part, start=a, stop=b) for a, b in zip(cuts[low:-1], cuts[low + 1 :], strict=True)]
            yield from pool.map(_read, few[:AT_ONCE])


def _read(part: ByteRange) -> bytes:
    return storage.read_range(part.url, part.start, part.stop - part.start, part.size, part.version)


def _write_starts(path: str, starts: np.ndarray) -> None:
    """Offsets outlive a restart of the machine, so they carry a hash."""
    content = (starts // BLOCK).astype("<u4").tobytes()
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
    return np.frombuffer(content, "<u4").astype(np.int64) * BLOCK
