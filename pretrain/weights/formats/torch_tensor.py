"""Tensors of a torch.save file: where each one lies, checked against its storage, and its elements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data_pipeline.errors import UserError
from pretrain.weights.byte_file import ByteFile
from pretrain.weights.dtypes import DTYPES, MAX_DIMENSIONS, elements
from pretrain.weights.formats.zip_directory import Entry, ZipDirectory

LARGEST_EXPANDED = 64 << 20
"""Bytes of the largest tensor that may be larger than its storage (made by `expand`)."""


class TensorFile(Protocol):
    """What a tensor needs of the file it lies in (`torch_file.TorchFile`)."""

    name: str
    file: ByteFile
    directory: ZipDirectory

    def refused(self, error: Exception) -> UserError:
        """The error for what torch.save does not write."""

    def gathered(self, tensor: Tensor) -> np.ndarray:
        """All elements of a strided tensor of a remote file, flat."""


class Storage:
    """A run of bytes in the file; where it begins is looked up when it is first read."""

    def __init__(self, file: TensorFile, entry: Entry, nbytes: int, dtype: str) -> None:
        self.file, self.entry, self.nbytes, self.dtype = file, entry, nbytes, dtype
        self._start: int | None = None

    @property
    def offset(self) -> int:
        """In bytes, in the file."""
        if self._start is None:
            try:
                self._start = self.file.directory.start(self.entry)
            except ValueError as error:
                raise self.file.refused(error) from None
        return self._start

    def bytes(self, start: int, stop: int) -> memoryview:
        return self.file.file.read(self.offset + start, self.offset + stop)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a storage with state of its own")


@dataclass(frozen=True, eq=False)
class Tensor:
    """Where a tensor lies in the file; `read` gives its elements."""

    storage: Storage
    dtype: str
    offset: int  # in elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a tensor with state of its own")

    @property
    def numel(self) -> int:
        return elements(self.shape)

    @property
    def place(self) -> tuple[str, int, int, tuple[int, ...], tuple[int, ...]]:
        """Equal for tensors that are one and the same memory."""
        return self.storage.file.name, self.storage.entry.header, self.offset, self.shape, self.stride

    def read(self, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) in row-major order: a view where the tensor is contiguous, else a copy."""
        kind = DTYPES[self.dtype]
        if self.contiguous:
            low, high = ((self.offset + n) * kind.itemsize for n in (start, stop))
            return np.frombuffer(self.storage.bytes(low, high), kind)
        if self.storage.file.file.remote:
            return self.storage.file.gathered(self)[start:stop]
        row = elements(self.shape[1:])
        first = start // row
        return self.strided()[first : -(-stop // row)].reshape(-1)[start - first * row : stop - first * row]

    def strided(self) -> np.ndarray:
        kind = DTYPES[self.dtype]
        last = self.offset + _last_element(self.shape, self.stride)
        span = self.storage.bytes(self.offset * kind.itemsize, (last + 1) * kind.itemsize)
        strides = tuple(step * kind.itemsize for step in self.stride)
        return np.lib.stride_tricks.as_strided(
            np.frombuffer(span, kind), self.shape, strides, writeable=False
        )

    @property
    def contiguous(self) -> bool:
        expected = 1
        for side, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if side != 1 and step != expected:
                return self.numel == 0
            expected *= side
        return True


def checked_tensor(storage: Storage, dtype: str, offset: Any, shape: Any, stride: Any) -> Tensor:
    if not (isinstance(shape, tuple | list) and isinstance(stride, tuple | list)):
        raise ValueError("a tensor whose shape or stride is no list of numbers")
    if len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {len(shape)} dimensions and {len(stride)} strides")
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in (offset, *shape, *stride)):
        raise ValueError("a tensor whose shape, stride or offset is no whole number from 0 on")
    taken = elements(tuple(shape)) * DTYPES[dtype].itemsize
    if taken and (offset + _last_element(shape, stride) + 1) * DTYPES[dtype].itemsize > storage.nbytes:
        raise ValueError(f"a tensor of shape {tuple(shape)} that reaches beyond its storage")
    if taken > max(storage.nbytes, LARGEST_EXPANDED):
        raise ValueError(f"a tensor of shape {tuple(shape)} over {storage.nbytes} bytes")
    return Tensor(storage, dtype, offset, tuple(shape), tuple(stride))


def _last_element(shape: Any, stride: Any) -> int:
    """Elements from the first to the last of a tensor that is not empty."""
    return sum((side - 1) * step for side, step in zip(shape, stride, strict=True))
