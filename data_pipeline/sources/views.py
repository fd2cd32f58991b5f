"""A view of a source: the samples that a filter keeps, as a bitmap that is searched for the n-th of a shard."""

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

FOLDER = "_index/views"
FORMAT = "1"
NUMBERS = ("count", "size", "kept", "block")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SAMPLES_PER_BLOCK = 512  # samples whose bits share a rank
BYTES = SAMPLES_PER_BLOCK // 8
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
ONES = _BITS.sum(axis=1).astype(np.uint8)
"""uint8 [256]: bits set in a byte."""
# uint8 [256, 8]: place of the n-th set bit of a byte.
_PLACE = np.argsort(1 - _BITS, axis=1, kind="stable").astype(np.uint8)


@dataclass(frozen=True, eq=False)
class View:
    """The bitmap file, and for each shard of a manifest its first block in it and the samples of its tar."""

    name: str
    url: str
    blocks: np.ndarray  # int64 [shards]
    tar_counts: np.ndarray  # int64 [shards]

    @property
    def digest(self) -> str:
        """16 hex digits over the bitmap, by which its file is named."""
        return self.url[-21:-5]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_maps"}

    @cached_property
    def _maps(self) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [blocks, 64], the bits; uint32 [blocks], samples kept before each block in its shard."""
        if storage.is_remote(self.url):
            data: Any = storage.read_bytes(self.url)
        else:
            with storage.open_bytes(self.url) as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return split(data, self.url)

    def in_tar(self, shards: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """int64: position in its tar of the `indices`-th sample kept of `shards`; the arguments broadcast."""
        shards, indices = np.broadcast_arrays(np.asarray(shards, np.int64), np.asarray(indices, np.int64))
        found = self._select(shards.reshape(-1), indices.reshape(-1))
        return found.reshape(shards.shape)

    def _select(self, shards: np.ndarray, indices: np.ndarray) -> np.ndarray:
        bits, ranks = self._maps
        first = self.blocks[shards]
        low, high = first.copy(), first + np.maximum(1, -(-self.tar_counts[shards] // SAMPLES_PER_BLOCK))
        while (high - low > 1).any():
            middle = (low + high) // 2
            before = ranks[middle] <= indices
            low, high = np.where(before, middle, low), np.where(before, high, middle)
        rest = indices - ranks[low]
        rows = bits[low]
        so_far = np.cumsum(ONES[rows], axis=1, dtype=np.int16)
        byte = (so_far <= rest[:, None]).sum(axis=1)
        if (byte == BYTES).any() or (indices < 0).any():
            raise IndexError(f"view {self.name} keeps fewer samples of a shard")
        each = np.arange(len(rows))
        value = rows[each, byte]
        rest -= so_far[each, byte] - ONES[value]
        return (low - first) * SAMPLES_PER_BLOCK + byte * 8 + _PLACE[value, rest]


def split(data: Any, url: str) -> tuple[np.ndarray, np.ndarray]:
    """Bits uint8 [blocks, 64] and ranks uint32 [blocks] of a bitmap file's bytes."""
    blocks, rest = divmod(len(data), BYTES + 4)
    if rest or not blocks:
        raise UserError(f"{url} is no view; make it again with: dromos data view")
    bits = np.frombuffer(data, np.uint8, blocks * BYTES).reshape(blocks, BYTES)
    return bits, np.frombuffer(data, "<u4", blocks, blocks * BYTES)


def pack(kept: np.ndarray) -> np.ndarray:
    """uint8 [blocks, 64], the bits of a shard; `kept` is bool [samples]."""
    part = np.zeros(max(1, -(-len(kept) // SAMPLES_PER_BLOCK)) * SAMPLES_PER_BLOCK, bool)
    part[: len(kept)] = kept
    return np.packbits(part, bitorder="little").reshape(-1, BYTES)


def ranks_of(bits: np.ndarray, lengths: np.ndarray) -> tuple[bytes, np.ndarray]:
    """A bitmap file of the shards' bits laid end to end, `lengths` bytes each, and the first block of each shard."""
    blocks = lengths // BYTES
    first = np.cumsum(blocks) - blocks
    held = ONES[bits].reshape(-1, BYTES).sum(axis=1, dtype=np.int64)
    before = np.cumsum(held) - held
    ranks = before - np.repeat(before[first], blocks)
    return bits.tobytes() + ranks.astype("<u4").tobytes(), first


def folder_of(root: str) -> str:
    return storage.join(root, FOLDER)


def check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot name a view: letters, digits, . _ and -, 64 at most")


def open_view(
    name: str, root: str, paths: list[str], counts: np.ndarray, sizes: np.ndarray
) -> tuple[View, Any]:
    """The view of these shards, and int64 [shards], the samples that it keeps of each.

    Raises UserError if there is no such view, or a shard is not what it was when the view was made.
    """
    check_name(name)
    url = storage.join(folder_of(root), f"{name}.parquet")
    table, bits = _read(url, name, root)
    again = f"make it again with: dromos data view {root} --name {name} ..."
    row = {path: number for number, path in enumerate(table["path"].to_pylist())}
    missing = [path for path in paths if path not in row]
    if missing:
        raise UserError(f"view {name!r} does not know {missing[0]} of {root}, which is newer; {again}")
    rows = np.array([row[path] for path in paths], np.int64)
    then = {key: column(table, key)[rows].astype(np.int64) for key in NUMBERS}
    changed = np.flatnonzero((then["count"] != counts) | (then["size"] != sizes))
    if len(changed):
        at = int(changed[0])
        raise UserError(
            f"{storage.join(root, paths[at])} has {counts[at]} samples in {sizes[at]} bytes, had {then['count'][at]} "
            f"in {then['size'][at]} when view {name!r} was made; {again}"
        )
    return View(name, storage.join(folder_of(root), bits), then["block"], counts), then["kept"]


def _read(url: str, name: str, root: str) -> tuple[pa.Table, str]:
    if not storage.exists(url):
        raise UserError(
            f"there is no view {name!r} of {root}: {url} does not exist; make it with: dromos data view "
            f"{root} --name {name} --where '...'"
        )
    try:
        table, metadata = read_table(url)
        bits = metadata["bits"]
        if metadata["dromos_view"] != FORMAT or not re.fullmatch(
            re.escape(name) + r"-[0-9a-f]{16}\.bits", bits
        ):
            raise KeyError(bits)
        if metadata["digest"] != digest(table, NUMBERS, bits):
            raise KeyError("its content is not what was written")
        where = storage.join(os.path.dirname(url), bits)
        if xxhash.xxh64_hexdigest(storage.read_bytes(where)) != bits[-21:-5]:
            raise KeyError(f"{bits} is damaged")
    except (KeyError, ValueError, FileNotFoundError) as error:
        raise UserError(f"{url} is no view ({error}); make it again with: dromos data view") from None
    return table, bits
