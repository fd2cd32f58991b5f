"""Member tables packed into flat arrays: one sample of ten thousand is found without reading the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np

from data_pipeline.tar import Sample

HEADER = 4  # uint64 words: samples, members, bytes of the keys, bytes of the extension names


def pack_table(table: Sequence[Sample]) -> bytes:
    """A shard's samples as one block: header, then arrays, each padded to 8 bytes."""
    extensions = sorted({extension for sample in table for extension in sample.members})
    number = {extension: i for i, extension in enumerate(extensions)}
    members = [(number[e], *place) for sample in table for e, place in sample.members.items()]
    keys = [sample.key.encode("utf-8", "surrogateescape") for sample in table]
    names = "\0".join(extensions).encode("utf-8", "surrogateescape")
    arrays: list[np.ndarray] = [
        np.array([len(table), len(members), sum(map(len, keys)), len(names)], np.uint64),
        np.array([offset for _, offset, _ in members], np.int64),
        np.array([length for _, _, length in members], np.int64),
        np.cumsum([len(sample.members) for sample in table], dtype=np.uint32),
        np.cumsum([len(key) for key in keys], dtype=np.uint32),
        np.array([extension for extension, _, _ in members], np.uint16),
    ]
    parts = [array.tobytes() for array in arrays] + [b"".join(keys), names]
    return b"".join(part + bytes(-len(part) % 8) for part in parts)


class PackedTable(Sequence[Sample]):
    """A block of `pack_table`, read in place; behaves like the list it was made of."""

    def __init__(self, block: np.ndarray) -> None:
        """`block`: uint8, of any memory, also a memory map."""
        samples, members, key_bytes, name_bytes = (int(n) for n in block[: 8 * HEADER].view(np.uint64))
        self._samples = samples
        # Pages of a mapped file are the kernel's, shared by all processes and given back at will.
        self.own_bytes = 0 if isinstance(block, np.memmap) else block.nbytes
        position = 8 * HEADER

        def take(size: int) -> np.ndarray:
            nonlocal position
            part = block[position : position + size]
            position += size + -size % 8
            return part

        self._offsets = take(8 * members).view(np.int64)
        self._lengths = take(8 * members).view(np.int64)
        self._member_ends = take(4 * samples).view(np.uint32)
        self._key_ends = take(4 * samples).view(np.uint32)
        self._extensions = take(2 * members).view(np.uint16)
        self._keys = take(key_bytes)
        names = take(name_bytes).tobytes().decode("utf-8", "surrogateescape")
        self._names = names.split("\0") if members else []

    def __len__(self) -> int:
        return self._samples

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._samples))]
        if not -self._samples <= index < self._samples:
            raise IndexError(f"sample {index} of {self._samples}")
        index %= self._samples
        first, last = _bounds(self._member_ends, index)
        start, stop = _bounds(self._key_ends, index)
        return Sample(
            self._keys[start:stop].tobytes().decode("utf-8", "surrogateescape"),
            {
                self._names[self._extensions[m]]: (int(self._offsets[m]), int(self._lengths[m]))
                for m in range(first, last)
            },
        )


def _bounds(ends: np.ndarray, index: int) -> tuple[int, int]:
    return (int(ends[index - 1]) if index else 0), int(ends[index])
