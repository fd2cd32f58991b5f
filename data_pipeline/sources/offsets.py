"""Byte range of every sample: memory-mapped from the index, or found by scanning tars and kept in an LRU cache."""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.sources.offset_file import GROUP, OffsetFile, block_bytes, check_of
from data_pipeline.sources.tar_members import TAR_BLOCK_BYTES

if TYPE_CHECKING:
    from data_pipeline.sources.manifest import Manifest
    from data_pipeline.storage.cache import CacheSettings


NO_BLOCK = -1  # in place of a block's position: the shard has no block in an offset file
ROWS_PER_LOOKUP = 16_384


def _map(path: str) -> Any:
    """Memory map of a file; b"" if it is empty."""
    with storage.open_bytes(path) as opened:
        size = os.fstat(opened.fileno()).st_size
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) if size else b""


def _map_remote(url: str, cache: CacheSettings) -> Any:
    """Memory map of a remote file's copy in the node cache, shared by all processes; without a cache, its bytes."""
    from data_pipeline.storage.cached_ranges import local_copy

    path = local_copy(cache, url)
    if path is not None:
        with suppress(FileNotFoundError):  # the cache may have evicted it meanwhile
            return _map(path)
    return storage.read_bytes(url)


class Offsets:
    """Byte ranges of a source's samples, from its index, or added shard by shard with `add` after a scan.

    The index is memory-mapped: its pages belong to the kernel's page cache, and a process holds only a few numbers per
    shard. Added offsets take 4 bytes per sample, at most `limit_bytes`; the least recently used shards are evicted,
    and `evicted` is True from then on.
    """

    def __init__(
        self, manifest: Manifest, limit_bytes: int = 1 << 30, cache: CacheSettings | None = None
    ) -> None:
        self._counts = manifest.tar_counts
        self._added: OrderedDict[int, np.ndarray] = OrderedDict()
        self._limit, self._bytes = limit_bytes, 0
        self.evicted = False
        file = manifest.offsets
        self._blocks = np.full(len(self._counts), NO_BLOCK) if file is None else file.blocks
        self._widths = np.zeros(len(self._counts), np.uint8) if file is None else file.widths
        self._checks = None if file is None else file.checks
        self._checked = np.zeros(len(self._counts), bool)
        self._all_indexed = bool((self._blocks != NO_BLOCK).all())
        self._any_wide = bool((self._widths == 4).any())
        if file is not None:
            self._open(file, cache)

    def _open(self, file: OffsetFile, cache: CacheSettings | None) -> None:
        data: Any
        try:
            if storage.is_remote(file.url):
                data = _map_remote(file.url, cache) if cache is not None else storage.read_bytes(file.url)
            else:
                data = _map(file.url)
        except FileNotFoundError:
            raise missing_offsets_error(file.url) from None
        last = int(np.argmax(self._blocks))
        end = int(self._blocks[last]) + block_bytes(int(self._counts[last]), int(self._widths[last]))
        if len(data) % 4 or end > len(data):
            raise _damaged_error(file.url)
        self._url, self._data = file.url, memoryview(data)
        self._narrow, self._wide = np.frombuffer(data, "<u2"), np.frombuffer(data, "<u4")
        self._narrow_at, self._wide_at = memoryview(data).cast("H"), memoryview(data).cast("I")

    def has(self, shard: int) -> bool:
        """True if the ranges of the shard's samples are available."""
        return shard in self._added or bool(self._blocks[shard] != NO_BLOCK)

    def add(self, shard: int, starts: np.ndarray) -> None:
        """Keep a shard's offsets in memory; `starts` as in `offset_file.pack_starts`."""
        if shard in self._added:
            self._bytes -= self._added.pop(shard).nbytes
        self._added[shard] = (starts // TAR_BLOCK_BYTES).astype(np.uint32)
        self._bytes += self._added[shard].nbytes
        while self._bytes > self._limit and len(self._added) > 1:
            self._bytes -= self._added.popitem(last=False)[1].nbytes
            self.evicted = True

    def range(self, shard: int, index: int) -> tuple[int, int]:
        """(start, stop) of one sample in bytes; faster than `ranges`. Raises as `ranges` does."""
        if not 0 <= index < self._counts[shard]:
            raise IndexError(f"sample {index} of {self._counts[shard]} in shard {shard}")
        if shard in self._added:
            self._added.move_to_end(shard)
            starts = self._added[shard]
            return int(starts[index]) * TAR_BLOCK_BYTES, int(starts[index + 1]) * TAR_BLOCK_BYTES
        block, stop = int(self._blocks[shard]), index + 1
        if block == NO_BLOCK:
            raise KeyError(f"no offsets of shard {shard}: it has not been scanned yet")
        if not self._checked[shard]:
            self._check(shard)
        if self._widths[shard] == 4:
            at = block // 4
            return self._wide_at[at + index] * TAR_BLOCK_BYTES, self._wide_at[at + stop] * TAR_BLOCK_BYTES
        return self._entry(block, index) * TAR_BLOCK_BYTES, self._entry(block, stop) * TAR_BLOCK_BYTES

    def _entry(self, block: int, entry: int) -> int:
        """One 2-byte entry, in units of 512 bytes."""
        group = entry // GROUP
        base = self._wide_at[block // 4 + (GROUP // 2 + 1) * group]
        return base + self._narrow_at[block // 2 + entry + 2 * (group + 1)]

    def _check(self, shard: int) -> None:
        """Verify the hash of a shard's block. Raises UserError if it is damaged."""
        start, samples = int(self._blocks[shard]), int(self._counts[shard])
        block = self._data[start : start + block_bytes(samples, int(self._widths[shard]))]
        if self._checks is not None and check_of(block, samples) != self._checks[shard]:
            raise _damaged_error(self._url)
        self._checked[shard] = True

    def ranges(self, shards: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(start, stop) in bytes, int64 arrays; `indices` are positions in the tars, and the arguments broadcast.

        Raises IndexError if a shard has no such sample, KeyError if `has` is False for a shard.
        """
        shards, indices = np.broadcast_arrays(np.asarray(shards, np.int64), np.asarray(indices, np.int64))
        if ((indices < 0) | (indices >= self._counts[shards])).any():
            raise IndexError("a shard has no sample with this index")
        if not self._added and self._all_indexed:
            return self._mapped_in_shard_order(shards, indices)
        start, stop = np.empty(shards.shape, np.int64), np.empty(shards.shape, np.int64)
        mapped = self._blocks[shards] != NO_BLOCK
        start[mapped], stop[mapped] = self._mapped(shards[mapped], indices[mapped])
        for shard in np.unique(shards[~mapped]):
            rows = ~mapped & (shards == shard)
            if int(shard) not in self._added:
                raise KeyError(f"no offsets of shard {shard}: it has not been scanned yet")
            starts = self._added[int(shard)].astype(np.int64) * TAR_BLOCK_BYTES
            start[rows], stop[rows] = starts[indices[rows]], starts[indices[rows] + 1]
        return start, stop

    def _mapped_in_shard_order(
        self, shards: np.ndarray, indices: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`_mapped` for many rows: sorted by shard, a block of rows at a time.

        Page faults take most of the time of a process's first batch; this order makes them a tenth cheaper.
        """
        if shards.size <= ROWS_PER_LOOKUP:
            return self._mapped(shards, indices)
        start, stop = np.empty(shards.size, np.int64), np.empty(shards.size, np.int64)
        order = np.argsort(shards, axis=None)
        for at in range(0, shards.size, ROWS_PER_LOOKUP):
            rows = order[at : at + ROWS_PER_LOOKUP]
            start[rows], stop[rows] = self._mapped(shards.reshape(-1)[rows], indices.reshape(-1)[rows])
        return start.reshape(shards.shape), stop.reshape(shards.shape)

    def _mapped(self, shards: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(start, stop) of samples whose shards have a block in the index."""
        if not shards.size:
            return np.zeros(shards.shape, np.int64), np.zeros(shards.shape, np.int64)
        blocks = self._blocks[shards]
        if not self._any_wide:
            return self._entries(blocks, indices), self._entries(blocks, indices + 1)
        start, stop = np.empty(shards.shape, np.int64), np.empty(shards.shape, np.int64)
        wide = self._widths[shards] == 4
        at = blocks[wide] // 4 + indices[wide]
        start[wide] = self._wide[at].astype(np.int64) * TAR_BLOCK_BYTES
        stop[wide] = self._wide[at + 1].astype(np.int64) * TAR_BLOCK_BYTES
        start[~wide] = self._entries(blocks[~wide], indices[~wide])
        stop[~wide] = self._entries(blocks[~wide], indices[~wide] + 1)
        return start, stop

    def _entries(self, blocks: np.ndarray, entries: np.ndarray) -> np.ndarray:
        """Bytes that 2-byte entries of the given blocks encode."""
        groups = entries // GROUP
        bases = self._wide[blocks // 4 + (GROUP // 2 + 1) * groups].astype(np.int64)
        return (bases + self._narrow[blocks // 2 + entries + 2 * (groups + 1)]) * TAR_BLOCK_BYTES


def missing_offsets_error(url: str) -> UserError:
    """UserError for an index whose offset file does not exist."""
    return UserError(
        f"{url} is gone: run again if the index was just rebuilt; otherwise run: dromos data index {_root(url)}"
    )


def _root(url: str) -> str:
    return os.path.dirname(os.path.dirname(url))


def _damaged_error(url: str) -> UserError:
    return UserError(
        f"{url} is damaged or does not belong to the shards.parquet beside it; run: dromos data index {_root(url)}"
    )
