"""Manifest views: a bitmap of the samples that a filter keeps, with a fast lookup of the n-th kept sample.

A bitmap file holds 64 bytes of bits per block of 512 samples, for all blocks, then one uint32 rank per block: the
samples kept before the block in its shard. Each shard starts at a new block. The n-th kept sample of a shard is found
by a binary search over the ranks and a search within one block.
"""

from __future__ import annotations

import mmap
import os
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.storage.parquet_table import column, digest, read_table

if TYPE_CHECKING:
    import pyarrow as pa

VIEWS_FOLDER = "_index/views"
VIEW_FORMAT = "1"
NUMBER_COLUMNS = ("count", "size", "kept", "block")  # of a view's table, which also has the column "path"
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SAMPLES_PER_BLOCK = 512
BYTES_PER_BLOCK = SAMPLES_PER_BLOCK // 8
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
SET_BITS = _BITS.sum(axis=1).astype(np.uint8)  # uint8 [256]: number of set bits of a byte
# uint8 [256, 8]: position of the n-th set bit of a byte.
_BIT_POSITION = np.argsort(1 - _BITS, axis=1, kind="stable").astype(np.uint8)


@dataclass(frozen=True, eq=False)
class View:
    """A bitmap file, and the blocks of it that belong to the shards of a manifest."""

    name: str
    url: str
    blocks: np.ndarray  # int64 [shards], first block of the shard
    tar_counts: np.ndarray  # int64 [shards], samples of the tar

    @property
    def digest(self) -> str:
        """Hash of the bitmap, 16 hex digits, which is part of its file name."""
        return self.url[-21:-5]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_maps"}

    @cached_property
    def _maps(self) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [blocks, 64], the bits; uint32 [blocks], the ranks."""
        if storage.is_remote(self.url):
            data: Any = storage.read_bytes(self.url)
        else:
            with storage.open_bytes(self.url) as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return split_bitmap(data, self.url)

    def tar_positions(self, shards: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """int64: position in its tar of the `indices`-th kept sample of `shards`; the arguments broadcast.

        Raises IndexError if a shard has fewer kept samples.
        """
        shards, indices = np.broadcast_arrays(np.asarray(shards, np.int64), np.asarray(indices, np.int64))
        positions = self._select(shards.reshape(-1), indices.reshape(-1))
        return positions.reshape(shards.shape)

    def _select(self, shards: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """`tar_positions` of flat arrays."""
        bits, ranks = self._maps
        # 1. Binary search for the block: the last one with rank <= index.
        first = self.blocks[shards]
        low, high = first.copy(), first + np.maximum(1, -(-self.tar_counts[shards] // SAMPLES_PER_BLOCK))
        while (high - low > 1).any():
            middle = (low + high) // 2
            is_before = ranks[middle] <= indices
            low, high = np.where(is_before, middle, low), np.where(is_before, high, middle)
        # 2. The byte within the block.
        rest = indices - ranks[low]
        rows = bits[low]
        so_far = np.cumsum(SET_BITS[rows], axis=1, dtype=np.int16)
        byte = (so_far <= rest[:, None]).sum(axis=1)
        if (byte == BYTES_PER_BLOCK).any() or (indices < 0).any():
            raise IndexError(f"view {self.name} keeps fewer samples of a shard")
        # 3. The bit within the byte.
        row = np.arange(len(rows))
        value = rows[row, byte]
        rest -= so_far[row, byte] - SET_BITS[value]
        return (low - first) * SAMPLES_PER_BLOCK + byte * 8 + _BIT_POSITION[value, rest]


def split_bitmap(data: Any, url: str) -> tuple[np.ndarray, np.ndarray]:
    """Bits uint8 [blocks, 64] and ranks uint32 [blocks] of the content of a bitmap file."""
    blocks, rest = divmod(len(data), BYTES_PER_BLOCK + 4)
    if rest or not blocks:
        raise UserError(f"{url} is not a valid view; build it again with: dromos data view")
    bits = np.frombuffer(data, np.uint8, blocks * BYTES_PER_BLOCK).reshape(blocks, BYTES_PER_BLOCK)
    return bits, np.frombuffer(data, "<u4", blocks, blocks * BYTES_PER_BLOCK)


def pack_bits(kept: np.ndarray) -> np.ndarray:
    """Bits of a shard, uint8 [blocks, 64]; `kept` is bool [samples]."""
    padded = np.zeros(max(1, -(-len(kept) // SAMPLES_PER_BLOCK)) * SAMPLES_PER_BLOCK, bool)
    padded[: len(kept)] = kept
    return np.packbits(padded, bitorder="little").reshape(-1, BYTES_PER_BLOCK)


def bitmap_content(bits: np.ndarray, lengths: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Content of a bitmap file and the first block of each shard, int64 [shards].

    `bits` is the shards' packed bits one after the other, flat uint8; `lengths` is int64 [shards], bytes.
    """
    blocks = lengths // BYTES_PER_BLOCK
    first = np.cumsum(blocks) - blocks
    kept = SET_BITS[bits].reshape(-1, BYTES_PER_BLOCK).sum(axis=1, dtype=np.int64)
    before = np.cumsum(kept) - kept
    ranks = before - np.repeat(before[first], blocks)
    return bits.tobytes() + ranks.astype("<u4").tobytes(), first


def views_folder(root: str) -> str:
    """Folder of the views of a source."""
    return storage.join(root, VIEWS_FOLDER)


def check_name(name: str) -> None:
    """Raise UserError if `name` is not a valid view name."""
    if not NAME_PATTERN.fullmatch(name):
        raise UserError(
            f"{name!r} is not a valid view name: use letters, digits, . _ and -, at most 64 characters"
        )


def open_view(
    name: str, root: str, paths: list[str], counts: np.ndarray, sizes: np.ndarray
) -> tuple[View, Any]:
    """Open a view of the given shards; returns it and the samples that it keeps, int64 [shards].

    Raises UserError if there is no such view, or if a shard has changed since the view was built.
    """
    check_name(name)
    url = storage.join(views_folder(root), f"{name}.parquet")
    table, bits = _read(url, name, root)
    advice = f"build it again with: dromos data view {root} --name {name} ..."
    row_of = {path: number for number, path in enumerate(table["path"].to_pylist())}
    missing = [path for path in paths if path not in row_of]
    if missing:
        raise UserError(f"view {name!r} does not contain {missing[0]} of {root}, which is newer; {advice}")
    rows = np.array([row_of[path] for path in paths], np.int64)
    built = {key: column(table, key)[rows].astype(np.int64) for key in NUMBER_COLUMNS}
    changed = np.flatnonzero((built["count"] != counts) | (built["size"] != sizes))
    if len(changed):
        shard = int(changed[0])
        raise UserError(
            f"{storage.join(root, paths[shard])} has {counts[shard]} samples in {sizes[shard]} bytes, but had "
            f"{built['count'][shard]} in {built['size'][shard]} when view {name!r} was built; {advice}"
        )
    return View(name, storage.join(views_folder(root), bits), built["block"], counts), built["kept"]


def _read(url: str, name: str, root: str) -> tuple[pa.Table, str]:
    """Table of a view and the name of its bitmap file; both are verified by their hashes."""
    if not storage.exists(url):
        raise UserError(
            f"there is no view {name!r} of {root}: {url} does not exist; build it with: dromos data view "
            f"{root} --name {name} --where '...'"
        )
    try:
        table, metadata = read_table(url)
        bits = metadata["bits"]
        if metadata["dromos_view"] != VIEW_FORMAT or not re.fullmatch(
            re.escape(name) + r"-[0-9a-f]{16}\.bits", bits
        ):
            raise KeyError(bits)
        if metadata["digest"] != digest(table, NUMBER_COLUMNS, bits):
            raise KeyError("its content does not match its digest")
        where = storage.join(os.path.dirname(url), bits)
        if xxhash.xxh64_hexdigest(storage.read_bytes(where)) != bits[-21:-5]:
            raise KeyError(f"{bits} is damaged")
    except (KeyError, ValueError, FileNotFoundError) as error:
        raise UserError(
            f"{url} is not a valid view ({error}); build it again with: dromos data view"
        ) from None
    return table, bits
