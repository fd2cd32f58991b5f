"""Tensors and storages of a torch.save file: positions validated against the storage, elements read in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data_pipeline.errors import UserError
from pretrain.weights.byte_file import ByteFile
from pretrain.weights.dtypes import DTYPES, MAX_DIMENSIONS, elements
from pretrain.weights.formats.zip_directory import Entry, ZipDirectory

MAX_EXPANDED_BYTES = 64 << 20  # limit of a tensor that is larger than its storage (a result of `expand`)


class TensorFile(Protocol):
    """The part of a file's interface that its tensors use; implemented by `torch_file.TorchFile`."""

    name: str
    file: ByteFile
    directory: ZipDirectory

    def refused(self, error: Exception) -> UserError:
        """The UserError for a file that is not what torch.save writes."""

    def read_strided_cached(self, tensor: Tensor) -> np.ndarray:
        """All elements of a strided tensor of a remote file, flat."""


class Storage:
    """A contiguous byte range of the file; its start is looked up at the first read."""

    def __init__(self, file: TensorFile, entry: Entry, nbytes: int, dtype: str) -> None:
        self.file, self.entry, self.nbytes, self.dtype = file, entry, nbytes, dtype
        self._start: int | None = None

    @property
    def offset(self) -> int:
        """Start in the file, in bytes."""
        if self._start is None:
            try:
                self._start = self.file.directory.start(self.entry)
            except ValueError as error:
                raise self.file.refused(error) from None
        return self._start

    def bytes(self, start: int, stop: int) -> memoryview:
        return self.file.file.read(self.offset + start, self.offset + stop)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it sets attributes on a storage")


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor by storage, offset, shape and strides; `read` returns its elements."""

    storage: Storage
    dtype: str
    offset: int  # in elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it sets attributes on a tensor")

    @property
    def numel(self) -> int:
        return elements(self.shape)

    @property
    def memory_key(self) -> tuple[str, int, int, tuple[int, ...], tuple[int, ...]]:
        """A key that is equal for tensors over the same memory."""
        return self.storage.file.name, self.storage.entry.header, self.offset, self.shape, self.stride

    def read(self, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) in row-major order: a view if the tensor is contiguous, else a copy."""
        kind = DTYPES[self.dtype]
        if self.contiguous:
            low, high = ((self.offset + n) * kind.itemsize for n in (start, stop))
            return np.frombuffer(self.storage.bytes(low, high), kind)
        if self.storage.file.file.remote:
            return self.storage.file.read_strided_cached(self)[start:stop]
        row = elements(self.shape[1:])
        first = start // row
        rows = np.ascontiguousarray(self.strided()[first : -(-stop // row)]).reshape(-1)
        return rows[start - first * row : stop - first * row]

    def strided(self) -> np.ndarray:
        """The tensor in its shape, as a read-only strided view."""
        kind = DTYPES[self.dtype]
        last = self.offset + _span(self.shape, self.stride)
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
    """Build a Tensor from values of a pickle; raises ValueError if they are malformed or exceed the storage."""
    if not (isinstance(shape, tuple | list) and isinstance(stride, tuple | list)):
        raise ValueError("it contains a tensor whose shape or stride is not a list of numbers")
    if len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"it contains a tensor of {len(shape)} dimensions and {len(stride)} strides")
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in (offset, *shape, *stride)):
        raise ValueError("it contains a tensor whose shape, stride or offset is not an integer of at least 0")
    taken = elements(tuple(shape)) * DTYPES[dtype].itemsize
    if taken and (offset + _span(shape, stride) + 1) * DTYPES[dtype].itemsize > storage.nbytes:
        raise ValueError(f"it contains a tensor of shape {tuple(shape)} that exceeds its storage")
    if taken > max(storage.nbytes, MAX_EXPANDED_BYTES):
        raise ValueError(
            f"it contains a tensor of shape {tuple(shape)}, too large for its storage of {storage.nbytes} bytes"
        )
    return Tensor(storage, dtype, offset, tuple(shape), tuple(stride))


def _span(shape: Any, stride: Any) -> int:
    """Distance in elements from the first to the last element of a tensor that is not empty."""
    return sum((side - 1) * step for side, step in zip(shape, stride, strict=True))
