"""Allow-list unpickler for torch.save files.

No code of a file runs, and a file cannot allocate more memory than its own size justifies.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from typing import Any

from pretrain.weights.dtypes import DTYPES, MAX_DIMENSIONS
from pretrain.weights.formats.safetensors_file import short
from pretrain.weights.formats.torch_tensor import Storage, Tensor, checked_tensor

STORAGES = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "UntypedStorage": "U8", "ComplexFloatStorage": "C64",
}  # fmt: skip
STORAGE_MODULES = ("torch", "torch.storage", "torch.cuda")
TORCH_DTYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
    "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "complex64": "C64",
}  # fmt: skip
# Names in torch.* that torch's own safe loader reads and that hold no weights: other dtypes, quantisation schemes (kept
# as their names), and the old classes of tensors (inert).
OTHER_DTYPE = re.compile(r"(b?complex|q?u?int|bits|float)\d\w*|per_(tensor|channel)_\w+")
TENSOR_CLASS = re.compile(r"torch(\.cuda)?(\.sparse)?\.[A-Z]\w*Tensor")
OTHER_STORAGE = re.compile(r"(\w+)Storage")
MAX_OPERATIONS = 4_000_000  # enough for about 100,000 tensors; an operation may allocate a hundred bytes


class Stub:
    """Inert replacement for an object of a class that is not needed: keeps the constructor's arguments."""

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


class Unread(Stub):
    """Replacement for a tensor that is not read as numbers; `args[0]` says what it is."""


class NotNeeded(pickle.UnpicklingError):
    """The pickle names a class or function that loading weights does not need."""


class Dict(dict[Any, Any]):
    """An OrderedDict of a pickle. Ignores attributes such as `_metadata`, because they could shadow its methods."""

    def __init__(self) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None: ...


class Function:
    """A callable that a pickle may name. Unlike a plain function, it refuses attributes set by BUILD."""

    __slots__ = ("_run",)

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run

    def __call__(self, *args: Any) -> Any:
        return self._run(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it sets attributes on a function")


def _rebuild(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Tensor | Unread:
    if isinstance(storage, Unread):
        return storage
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("it contains a tensor without storage")
    return checked_tensor(storage, storage.dtype, offset, shape, stride)


def _rebuild_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> Tensor | Unread:
    if not isinstance(storage, Storage) or not isinstance(dtype, str):
        raise pickle.UnpicklingError("it contains a tensor without storage or of an unknown dtype")
    if dtype not in DTYPES:
        return Unread(f"of dtype {dtype}")
    return checked_tensor(storage, dtype, offset, shape, stride)


def _from_type(rebuild: Any, _type: Any, args: Any, _state: Any) -> Any:
    if not isinstance(rebuild, Function):
        raise pickle.UnpicklingError("it rebuilds a tensor by an unknown function")
    return rebuild(*args)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _unread(what: str) -> Function:
    return Function(lambda *_: Unread(what))


def _counter(items: Any = None) -> dict[Any, Any]:
    if items is not None and not isinstance(items, dict):
        raise pickle.UnpicklingError("it contains a Counter that is not built from a dict")
    return dict(items or {})


def _complex(*parts: Any) -> complex:
    if len(parts) > 2 or not all(isinstance(part, int | float) for part in parts):
        raise pickle.UnpicklingError("it contains a complex number that is not built from numbers")
    return complex(*parts)


def _bytes(data: Any = b"", encoding: Any = "latin-1") -> bytes:
    if isinstance(data, str) and encoding in ("latin-1", "latin1"):
        return data.encode("latin-1")
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError("it contains a bytearray that is not built from bytes")
    return data


def _size(*sides: Any) -> tuple[Any, ...]:
    if len(sides) == 1 and isinstance(sides[0], list | tuple):
        sides = tuple(sides[0][: MAX_DIMENSIONS + 1])
    if len(sides) > MAX_DIMENSIONS or not all(type(side) is int for side in sides):
        raise pickle.UnpicklingError("it contains a size that is not a short list of integers")
    return sides


def _latin1(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("it contains bytes that are not latin1")
    return text.encode("latin1")


def _set(items: Any = ()) -> set[Any]:
    if not isinstance(items, list | tuple):
        raise pickle.UnpicklingError("it contains a set that is not built from a list")
    _check_keys(items)
    return set(items)


def _member(owner: Any, name: Any) -> Stub:
    """An enumeration member, which Python 3.11.2 (Debian 12) pickles as getattr(class, name)."""
    if not (isinstance(owner, type) and issubclass(owner, Stub) and isinstance(name, str)):
        raise pickle.UnpicklingError("it calls builtins.getattr on something other than an enumeration")
    return owner(name)


ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Dict,
    ("_codecs", "encode"): Function(_latin1),  # protocol 2 encodes bytes this way
    ("builtins", "set"): Function(_set),
    ("__builtin__", "set"): Function(_set),
    ("builtins", "getattr"): Function(_member),
    ("__builtin__", "getattr"): Function(_member),
    ("torch", "Size"): Function(_size),
    ("torch._utils", "_rebuild_tensor_v2"): Function(_rebuild),
    ("torch._utils", "_rebuild_tensor_v3"): Function(_rebuild_v3),
    ("torch._utils", "_rebuild_parameter"): Function(_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): Function(_from_type),
    ("collections", "Counter"): Function(_counter),
    ("builtins", "complex"): Function(_complex),
    ("__builtin__", "complex"): Function(_complex),
    ("builtins", "bytearray"): Function(_bytes),
    ("__builtin__", "bytearray"): Function(_bytes),
    ("torch._utils", "_rebuild_tensor"): Function(_rebuild),
    ("torch._utils", "_rebuild_parameter_with_state"): Function(_parameter),
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): Function(_parameter),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _unread(
        "of an accelerator, stored as a numpy array"
    ),
    ("torch._utils", "_rebuild_qtensor"): _unread("quantised by torch"),
    ("torch._utils", "_rebuild_sparse_tensor"): _unread("sparse"),
    ("torch._utils", "_rebuild_nested_tensor"): _unread("nested"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _unread("without data (on the meta device)"),
    ("torch._utils", "_rebuild_wrapper_subclass"): _unread("one rank's part of a distributed tensor"),
    **{("torch", name): dtype for name, dtype in TORCH_DTYPES.items()},
}
# Replaced by inert objects: they describe optimizers, arguments and RNG states, which weights do not need.
INERT = {
    ("torch", "Tensor"), ("torch", "device"), ("torch.nn.parameter", "Parameter"), ("argparse", "Namespace"),
    ("pathlib", "PosixPath"), ("pathlib", "Path"), ("numpy", "dtype"), ("numpy", "ndarray"),
    ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"),
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
    ("torch.serialization", "_get_layout"), ("torch.distributed.device_mesh", "DeviceMesh"),
}  # fmt: skip
INERT_MODULES = ("deepspeed.", "torch.distributed.tensor.")  # all of their classes
# Opcodes that torch.save never writes, and opcodes that allocate memory of a claimed size.
FORBIDDEN_CODES = {
    pickle.EXT1: "an extension code", pickle.EXT2: "an extension code", pickle.EXT4: "an extension code",
    pickle.INST: "an instance of protocol 0", pickle.OBJ: "an instance of protocol 1",
    pickle.PERSID: "a persistent object of protocol 0", pickle.BYTEARRAY8: "a bytearray",
    pickle.NEXT_BUFFER: "an out-of-band buffer", pickle.READONLY_BUFFER: "an out-of-band buffer",
}  # fmt: skip
PLAIN = (str, int, float, bool, bytes, type(None), Stub)


def _check_keys(keys: Any) -> None:
    """Raises UnpicklingError for nested tuples as keys: hashing tuples nested a million deep crashes the process."""
    for key in keys:
        if not isinstance(key, PLAIN) and not (
            isinstance(key, tuple) and all(isinstance(k, PLAIN) for k in key)
        ):
            raise pickle.UnpicklingError("it contains a key that is not text or a number")


# The Python implementation, because the C one allocates its memo for any index that a file claims.
_PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]


class Unpickler(_PythonUnpickler):
    """Unpickler of one file; `storage` builds a Storage from its key, dtype and size in bytes."""

    def __init__(self, data: bytes, storage: Callable[[str, str, int], Storage]) -> None:
        super().__init__(io.BytesIO(data))
        self._storage = storage
        self._left = 65536 + 4 * len(data)
        self._operations = 0

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module in STORAGE_MODULES and name in STORAGES:
            return Storage, STORAGES[name], name == "UntypedStorage"
        if module in STORAGE_MODULES and (storage := OTHER_STORAGE.fullmatch(name)):
            return Unread, storage[1], False
        if module == "torch" and OTHER_DTYPE.fullmatch(name):
            return name
        if (
            (module, name) in INERT
            or f"{module}.".startswith(INERT_MODULES)
            or TENSOR_CLASS.fullmatch(f"{module}.{name}")
        ):
            return type("Stub", (Stub,), {})
        raise NotNeeded(f"it uses {module}.{name}, which is not needed to load weights")

    def persistent_load(self, pid: Any) -> Storage | Unread:
        kind, (marker, dtype, untyped), key, _location, count = pid
        if kind == "storage" and marker is Unread:
            return Unread(f"of torch's {short(dtype)} type")
        if (
            kind != "storage"
            or marker is not Storage
            or type(count) is not int
            or not isinstance(key, str | int)
        ):
            raise pickle.UnpicklingError("it contains a persistent object that is not a storage")
        return self._storage(str(key), dtype, count if untyped else count * DTYPES[dtype].itemsize)

    def load_reduce(self) -> None:
        function, args = self.stack[-2], self.stack[-1]
        # Arguments of calls may be copied. The sum of all copies is limited by the size of the pickle.
        self._left -= sum(len(a) for a in args if isinstance(a, str | bytes | list | tuple | dict | set))
        if self._left < 0:
            raise pickle.UnpicklingError("its calls copy more data than the file holds")
        if not isinstance(function, Function | type):
            raise pickle.UnpicklingError(f"it calls a {type(function).__name__}, which is not a function")
        super().load_reduce()

    def load_newobj(self) -> None:
        cls = self.stack[-2]
        if not (isinstance(cls, type) and issubclass(cls, Stub | Dict)):
            raise pickle.UnpicklingError("it builds an object whose type is not an allowed class")
        super().load_newobj()

    def load_newobj_ex(self) -> None:
        cls = self.stack[-3]
        if not (isinstance(cls, type) and issubclass(cls, Stub | Dict)):
            raise pickle.UnpicklingError("it builds an object whose type is not an allowed class")
        super().load_newobj_ex()

    def load_setitem(self) -> None:
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        _check_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        _check_keys(self.stack[::2])
        super().load_dict()

    def load_frozenset(self) -> None:
        _check_keys(self.stack)
        super().load_frozenset()

    def load_additems(self) -> None:
        _check_keys(self.stack)
        super().load_additems()


Action = Callable[[Unpickler], None]


def _counted(action: Action) -> Action:
    def run(machine: Unpickler) -> None:
        machine._operations += 1
        if machine._operations > MAX_OPERATIONS:
            raise pickle.UnpicklingError(f"it has more than {MAX_OPERATIONS:,} operations")
        action(machine)

    return run


def _refused(what: str) -> Action:
    def run(machine: Unpickler) -> None:
        raise pickle.UnpicklingError(f"it contains {what}")

    return run


def _dispatch() -> dict[int, Action]:
    overridden = {
        pickle.REDUCE: Unpickler.load_reduce, pickle.NEWOBJ: Unpickler.load_newobj,
        pickle.NEWOBJ_EX: Unpickler.load_newobj_ex, pickle.SETITEM: Unpickler.load_setitem,
        pickle.SETITEMS: Unpickler.load_setitems, pickle.DICT: Unpickler.load_dict,
        pickle.FROZENSET: Unpickler.load_frozenset, pickle.ADDITEMS: Unpickler.load_additems,
    }  # fmt: skip
    table = {code: _counted(action) for code, action in _PythonUnpickler.dispatch.items()}
    table |= {code[0]: _counted(action) for code, action in overridden.items()}
    return table | {code[0]: _refused(what) for code, what in FORBIDDEN_CODES.items()}


Unpickler.dispatch = _dispatch()
