"""torch.save files without torch: the zip is mapped, its pickle read by an allow-list; nothing in a file ever runs."""

from __future__ import annotations

import io
import mmap
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from pretrain.merge.safetensors_io import DTYPES, elements

STORAGES = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "UntypedStorage": "U8",
}  # fmt: skip
TORCH_DTYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
    "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3",
}  # fmt: skip


@dataclass(frozen=True)
class Storage:
    """A run of bytes in the mapped file."""

    file: TorchFile
    offset: int
    nbytes: int
    dtype: str

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a storage with state of its own")


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in the file; `read` gives its elements."""

    storage: Storage
    dtype: str
    offset: int  # in elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a tensor with state of its own")

    @property
    def numel(self) -> int:
        return elements(self.shape)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) in row-major order: a view where the tensor is contiguous, else a copy."""
        kind = DTYPES[self.dtype]
        if self._contiguous():
            at = self.storage.offset + (self.offset + start) * kind.itemsize
            return np.frombuffer(self.storage.file.map, kind, stop - start, at)
        whole = np.frombuffer(
            self.storage.file.map, kind, self.storage.nbytes // kind.itemsize, self.storage.offset
        )
        strides = tuple(step * kind.itemsize for step in self.stride)
        view = np.lib.stride_tricks.as_strided(whole[self.offset :], self.shape, strides, writeable=False)
        return view.reshape(-1)[start:stop]

    def _contiguous(self) -> bool:
        expected = 1
        for side, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if side != 1 and step != expected:
                return self.numel == 0
            expected *= side
        return True


class Stub:
    """Stands for an object of a class that is not needed: keeps its constructor's arguments, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Stub:
        self = object.__new__(cls)
        self.args = args
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    args: tuple[Any, ...]


class Function:
    """A callable that a pickle may name; closed to BUILD, which would set attributes of a plain function."""

    __slots__ = ("_run",)

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run

    def __call__(self, *args: Any) -> Any:
        return self._run(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function with state of its own")


def _rebuild(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Tensor:
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("a tensor without storage")
    return _tensor(storage, storage.dtype, offset, shape, stride)


def _rebuild_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any
) -> Tensor:
    if not isinstance(storage, Storage) or dtype not in DTYPES:
        raise pickle.UnpicklingError("a tensor without storage or of an unknown dtype")
    return _tensor(storage, dtype, offset, shape, stride)


def _tensor(storage: Storage, dtype: str, offset: Any, shape: Any, stride: Any) -> Tensor:
    shape, stride = tuple(shape), tuple(stride)
    if len(shape) != len(stride) or not all(type(n) is int and n >= 0 for n in (offset, *shape, *stride)):
        raise pickle.UnpicklingError(f"a tensor of shape {shape}, stride {stride}, offset {offset}")
    last = offset + sum((side - 1) * step for side, step in zip(shape, stride, strict=True))
    if elements(shape) and (last + 1) * DTYPES[dtype].itemsize > storage.nbytes:
        raise pickle.UnpicklingError(f"a tensor of shape {shape} that reaches beyond its storage")
    return Tensor(storage, dtype, offset, shape, stride)


def _from_type(rebuild: Any, _type: Any, args: Any, _state: Any) -> Any:
    if not isinstance(rebuild, Function):
        raise pickle.UnpicklingError("a tensor rebuilt by an unknown function")
    return rebuild(*args)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _size(*sides: Any) -> tuple[Any, ...]:
    return tuple(*sides)


def _latin1(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes that are not latin1")
    return text.encode("latin1")


def _member(owner: Any, name: Any) -> Stub:
    """A member of an enumeration, which Python 3.11.2 (Debian 12) pickles as getattr(class, name)."""
    if not (isinstance(owner, type) and issubclass(owner, Stub) and isinstance(name, str)):
        raise pickle.UnpicklingError("it names builtins.getattr of what is no enumeration")
    return owner(name)


ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): Function(_latin1),  # how protocol 2 spells bytes
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("builtins", "getattr"): Function(_member),
    ("__builtin__", "getattr"): Function(_member),
    ("torch", "Size"): Function(_size),
    ("torch._utils", "_rebuild_tensor_v2"): Function(_rebuild),
    ("torch._utils", "_rebuild_tensor_v3"): Function(_rebuild_v3),
    ("torch._utils", "_rebuild_parameter"): Function(_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): Function(_from_type),
    **{("torch", name): dtype for name, dtype in TORCH_DTYPES.items()},
}
# Kept as inert objects: they describe optimizers and random states, which no weight depends on.
INERT = {
    ("torch", "Tensor"), ("torch", "device"), ("torch.nn.parameter", "Parameter"),
    ("numpy", "dtype"), ("numpy", "ndarray"),
    ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"),
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, storage: Callable[[str, str, int], Storage]) -> None:
        super().__init__(io.BytesIO(data))
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return Storage, STORAGES[name], name == "UntypedStorage"
        if (module, name) in INERT or module == "deepspeed" or module.startswith("deepspeed."):
            return type("Stub", (Stub,), {})
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of weights needs")

    def persistent_load(self, pid: Any) -> Storage:
        kind, (marker, dtype, untyped), key, _location, count = pid
        if kind != "storage" or marker is not Storage or type(count) is not int:
            raise pickle.UnpicklingError("a persistent object that is no storage")
        return self._storage(str(key), dtype, count if untyped else count * DTYPES[dtype].itemsize)


class TorchFile:
    """One file of torch.save (zip format), mapped. `content` is its object with `Tensor`s in place of tensors."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                archive = zipfile.ZipFile(file)
                self._entries = {entry.filename: entry for entry in archive.infolist()}
                pickled = [name for name in self._entries if name.endswith("/data.pkl")]
                if len(pickled) != 1:
                    raise ValueError("it holds no data.pkl")
                self._root = pickled[0].removesuffix("data.pkl")
                order = (
                    archive.read(self._root + "byteorder")
                    if self._root + "byteorder" in self._entries
                    else b""
                )
                data = archive.read(pickled[0])
            if order not in (b"", b"little"):
                raise ValueError(f"its bytes are {order.decode(errors='replace')}-endian")
            self.content = _Unpickler(data, self._locate).load()
        except FileNotFoundError:
            raise UserError(f"{self.path}: not found") from None
        except (
            Exception
        ) as error:  # a hostile or broken pickle may raise anything; none of it may pass as success
            raise UserError(
                f"{self.path}: refused: {error}; only files written by torch.save are read"
            ) from None

    def _locate(self, key: str, dtype: str, nbytes: int) -> Storage:
        entry = self._entries.get(f"{self._root}data/{key}")
        if entry is None or entry.compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError(f"storage {key} is missing or compressed")
        local = self.map[entry.header_offset : entry.header_offset + 30]
        if local[:4] != b"PK\x03\x04":
            raise pickle.UnpicklingError(f"storage {key} has no header where the archive says")
        start = (
            entry.header_offset
            + 30
            + int.from_bytes(local[26:28], "little")
            + int.from_bytes(local[28:30], "little")
        )
        if nbytes > entry.file_size or start + entry.file_size > len(self.map):
            raise pickle.UnpicklingError(
                f"storage {key} is shorter than its tensors; the file may be truncated"
            )
        return Storage(self, start, nbytes, dtype)
