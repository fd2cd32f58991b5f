"""Byte ranges of samples: about two bytes a sample in one mapped file, or learned from the tars themselves."""

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
from data_pipeline.sources.tar import TAR_BLOCK_BYTES

if TYPE_CHECKING:
    from data_pipeline.sources.manifest import Manifest
    from data_pipeline.storage.cache import CacheSettings


UNKNOWN = -1
ROWS_PER_PIECE = 16_384  # rows looked up at once


def _map(path: str) -> Any:
    with storage.open_bytes(path) as opened:
        size = os.fstat(opened.fileno()).st_size
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) if size else b""


def _of_node(url: str, cache: CacheSettings) -> Any:
    """A remote file mapped from this node's cache, so that its processes share its memory; else its bytes."""
    from data_pipeline.storage.cached_ranges import local_copy

    path = local_copy(cache, url)
    if path is not None:
        with suppress(FileNotFoundError):  # the cache may have needed the room already
            return _map(path)
    return storage.read_bytes(url)


class Offsets:
    """Ranges of the samples of a source: from its index, or learned shard by shard.

    Of the index nothing but one number a shard is in this process's own memory; its pages are the kernel's. What is
    learned takes 4 bytes a sample, bounded by `limit_bytes`: the shards used longest ago are forgotten.
    """

    def __init__(
        self, manifest: Manifest, limit_bytes: int = 1 << 30, cache: CacheSettings | None = None
    ) -> None:
        self._counts = manifest.tar_counts
        self._learned: OrderedDict[int, np.ndarray] = OrderedDict()
        self._limit, self._bytes = limit_bytes, 0
        self.forgot = False
        file = manifest.offsets
        self._blocks = np.full(len(self._counts), UNKNOWN) if file is None else file.blocks
        self._widths = np.zeros(len(self._counts), np.uint8) if file is None else file.widths
        self._checks = None if file is None else file.checks
        self._checked = np.zeros(len(self._counts), bool)
        self._all_known = bool((self._blocks != UNKNOWN).all())
        self._any_wide = bool((self._widths == 4).any())
        if file is not None:
            self._open(file, cache)

    def _open(self, file: OffsetFile, cache: CacheSettings | None) -> None:
        data: Any
        try:
            if storage.is_remote(file.url):
                data = _of_node(file.url, cache) if cache is not None else storage.read_bytes(file.url)
            else:
                data = _map(file.url)
        except FileNotFoundError:
            raise offsets_gone(file.url) from None
        last = int(np.argmax(self._blocks))
        end = int(self._blocks[last]) + block_bytes(int(self._counts[last]), int(self._widths[last]))
        if len(data) % 4 or end > len(data):
            raise _damaged(file.url)
        self._url, self._data = file.url, memoryview(data)
        self._narrow, self._wide = np.frombuffer(data, "<u2"), np.frombuffer(data, "<u4")
        self._narrow_at, self._wide_at = memoryview(data).cast("H"), memoryview(data).cast("I")

    def knows(self, shard: int) -> bool:
        return shard in self._learned or bool(self._blocks[shard] != UNKNOWN)

    def learn(self, shard: int, starts: np.ndarray) -> None:
        """`starts` as in `pack_starts`."""
        if shard in self._learned:
            self._bytes -= self._learned.pop(shard).nbytes
        self._learned[shard] = (starts // TAR_BLOCK_BYTES).astype(np.uint32)
        self._bytes += self._learned[shard].nbytes
        while self._bytes > self._limit and len(self._learned) > 1:
            self._bytes -= self._learned.popitem(last=False)[1].nbytes
            self.forgot = True

    def range(self, shard: int, index: int) -> tuple[int, int]:
        """(start, stop) in bytes of one sample, fast."""
        if not 0 <= index < self._counts[shard]:
            raise IndexError(f"sample {index} of {self._counts[shard]} in shard {shard}")
        if shard in self._learned:
            self._learned.move_to_end(shard)
            starts = self._learned[shard]
            return int(starts[index]) * TAR_BLOCK_BYTES, int(starts[index + 1]) * TAR_BLOCK_BYTES
        block, stop = int(self._blocks[shard]), index + 1
        if block == UNKNOWN:
            raise KeyError(f"the samples of shard {shard} were not located yet")
        if not self._checked[shard]:
            self._check(shard)
        if self._widths[shard] == 4:
            at = block // 4
            return self._wide_at[at + index] * TAR_BLOCK_BYTES, self._wide_at[at + stop] * TAR_BLOCK_BYTES
        return self._entry(block, index) * TAR_BLOCK_BYTES, self._entry(block, stop) * TAR_BLOCK_BYTES

    def _entry(self, block: int, entry: int) -> int:
        group = entry // GROUP
        base = self._wide_at[block // 4 + (GROUP // 2 + 1) * group]
        return base + self._narrow_at[block // 2 + entry + 2 * (group + 1)]

    def _check(self, shard: int) -> None:
        start, samples = int(self._blocks[shard]), int(self._counts[shard])
        block = self._data[start : start + block_bytes(samples, int(self._widths[shard]))]
        if self._checks is not None and check_of(block, samples) != self._checks[shard]:
            raise _damaged(self._url)
        self._checked[shard] = True

    def ranges(self, shards: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(start, stop), int64 arrays of bytes in the tars; the arguments are positions in tars and broadcast.

        Raises IndexError for a sample that is not there, KeyError for a shard that was not located yet.
        """
        shards, indices = np.broadcast_arrays(np.asarray(shards, np.int64), np.asarray(indices, np.int64))
        if ((indices < 0) | (indices >= self._counts[shards])).any():
            raise IndexError("a sample is not in its shard")
        if not self._learned and self._all_known:
            return self._many(shards, indices)
        start, stop = np.empty(shards.shape, np.int64), np.empty(shards.shape, np.int64)
        mapped = self._blocks[shards] != UNKNOWN
        start[mapped], stop[mapped] = self._mapped(shards[mapped], indices[mapped])
        for shard in np.unique(shards[~mapped]):
            rows = ~mapped & (shards == shard)
            if int(shard) not in self._learned:
                raise KeyError(f"the samples of shard {shard} were not located yet")
            starts = self._learned[int(shard)].astype(np.int64) * TAR_BLOCK_BYTES
            start[rows], stop[rows] = starts[indices[rows]], starts[indices[rows] + 1]
        return start, stop

    def _many(self, shards: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`_mapped` in the order of the shards, piece by piece: the first touch of pages, which takes most of the time
        of a process's first batch, is a tenth cheaper."""
        if shards.size <= ROWS_PER_PIECE:
            return self._mapped(shards, indices)
        start, stop = np.empty(shards.size, np.int64), np.empty(shards.size, np.int64)
        order = np.argsort(shards, axis=None)
        for at in range(0, shards.size, ROWS_PER_PIECE):
            rows = order[at : at + ROWS_PER_PIECE]
            start[rows], stop[rows] = self._mapped(shards.reshape(-1)[rows], indices.reshape(-1)[rows])
        return start.reshape(shards.shape), stop.reshape(shards.shape)

    def _mapped(self, shards: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
        groups = entries // GROUP
        bases = self._wide[blocks // 4 + (GROUP // 2 + 1) * groups].astype(np.int64)
        return (bases + self._narrow[blocks // 2 + entries + 2 * (groups + 1)]) * TAR_BLOCK_BYTES


def offsets_gone(url: str) -> UserError:
    """The error for a table of shards without its offsets."""
    return UserError(
        f"{url} is gone: run again if the index was made anew meanwhile; else run: dromos data index {_root(url)}"
    )


def _root(url: str) -> str:
    return os.path.dirname(os.path.dirname(url))


def _damaged(url: str) -> UserError:
    return UserError(
        f"{url} is damaged or does not belong to the shards.parquet beside it; run: dromos data index {_root(url)}"
    )
