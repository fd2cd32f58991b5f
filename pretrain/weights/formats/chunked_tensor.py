"""A tensor whose parts are stored apart, as ranks hold them: read as the whole, part by part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pretrain.weights.dtypes import DTYPES, elements

Read = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class Part:
    """A box of the tensor: its first index and its length per dimension; `read` returns its flat elements."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    read: Read


@dataclass(frozen=True, eq=False)
class ChunkedTensor:
    """A tensor of the dtype `dtype` (safetensors spelling) and shape `shape`, covered by its parts."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if sum(elements(part.sizes) for part in self.parts) != elements(self.shape):
            raise ValueError(f"its parts do not cover the shape {list(self.shape)}")
        for part in self.parts:
            fits = zip(part.offsets, part.sizes, self.shape, strict=True)
            if not all(at >= 0 and at + size <= side for at, size, side in fits):
                raise ValueError(f"a part lies outside the shape {list(self.shape)}")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) in row-major order; a view if the tensor has one part."""
        if len(self.parts) == 1:
            return self.parts[0].read(start, stop)
        if start >= stop:
            return np.empty(0, DTYPES[self.dtype])
        row = elements(self.shape[1:])
        first, last = start // row, -(-stop // row)
        rows = np.empty((last - first, *self.shape[1:]), DTYPES[self.dtype])
        for part in self.parts:
            low, high = max(first, part.offsets[0]), min(last, part.offsets[0] + part.sizes[0])
            if low >= high:
                continue
            own = elements(part.sizes[1:])
            begin, end = (low - part.offsets[0]) * own, (high - part.offsets[0]) * own
            place = tuple(
                slice(at, at + size) for at, size in zip(part.offsets[1:], part.sizes[1:], strict=True)
            )
            rows[(slice(low - first, high - first), *place)] = part.read(begin, end).reshape(
                -1, *part.sizes[1:]
            )
        return rows.reshape(-1)[start - first * row : stop - first * row]


class ChunkedTensors:
    """A reader of named tensors."""

    def __init__(self, tensors: dict[str, ChunkedTensor]) -> None:
        self._tensors = tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def info(self, name: str) -> tuple[str, tuple[int, ...]]:
        return self._tensors[name].dtype, self._tensors[name].shape

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._tensors[name].read(start, stop)
