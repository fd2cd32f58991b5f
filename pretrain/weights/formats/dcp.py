"""torch.distributed.checkpoint folders (`.metadata`, `*.distcp`), read in place; nothing in the metadata runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from pretrain.weights.byte_file import ByteFile
from pretrain.weights.dtypes import DTYPES, MAX_DIMENSIONS
from pretrain.weights.folder import Folder
from pretrain.weights.formats.chunked_tensor import ChunkedTensor, ChunkedTensors, Part
from pretrain.weights.formats.safetensors_file import is_name, short
from pretrain.weights.formats.state_dict import NOT_WEIGHTS, select
from pretrain.weights.formats.torch_file import TorchFile
from pretrain.weights.formats.torch_pickle import Stub, Unpickler
from pretrain.weights.formats.torch_tensor import Tensor

METADATA = ".metadata"
PREFIX = "torch.distributed.checkpoint."
RECORDS = {
    ("metadata", "Metadata"), ("metadata", "TensorStorageMetadata"), ("metadata", "BytesStorageMetadata"),
    ("metadata", "ChunkStorageMetadata"), ("metadata", "TensorProperties"), ("metadata", "MetadataIndex"),
    ("metadata", "StorageMeta"), ("metadata", "_MEM_FORMAT_ENCODING"), ("filesystem", "_StorageInfo"),
}  # fmt: skip


class Record(Stub):
    """One object of the metadata: its attributes, as the pickle states them."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        object.__setattr__(self, "state", state)

    def get(self, name: str) -> Any:
        return self.state.get(name) if isinstance(self.state, dict) else None


class MetadataUnpickler(Unpickler):
    """The allow-list unpickler, with the classes of DCP's metadata as inert records."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith(PREFIX) and (module.removeprefix(PREFIX), name) in RECORDS:
            return type(name, (Record,), {})
        return super().find_class(module, name)


class Slice:
    """Bytes [start, stop) of a file, as a file."""

    def __init__(self, file: ByteFile, start: int, stop: int) -> None:
        self._file, self._start, self.size, self.name = file, start, stop - start, file.name

    @property
    def remote(self) -> bool:
        return self._file.remote

    @property
    def identity(self) -> str:
        return self._file.identity

    def read(self, start: int, stop: int) -> memoryview:
        return self._file.read(self._start + start, self._start + stop)

    def peek(self, start: int, stop: int) -> bytes:
        return self._file.peek(self._start + start, self._start + min(stop, self.size))

    def check_unchanged(self) -> None:
        self._file.check_unchanged()


class Item:
    """One stored box of a tensor: a torch.save archive inside a .distcp file, opened at the first read."""

    def __init__(self, file: ByteFile, start: int, length: int, dtype: str, sizes: tuple[int, ...]) -> None:
        if not 0 <= start <= start + length <= file.size:
            raise UserError(f"{file.name}: is shorter than {METADATA} says; copy it again")
        self._slice, self._dtype, self._sizes = Slice(file, start, start + length), dtype, sizes
        self._tensor: Tensor | None = None

    def read(self, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the box."""
        if self._tensor is None:
            tensor = TorchFile(self._slice).content
            if not isinstance(tensor, Tensor) or (tensor.dtype, tensor.shape) != (self._dtype, self._sizes):
                raise UserError(
                    f"{self._slice.name}: holds another tensor than {METADATA} says; copy the folder again"
                )
            self._tensor = tensor
        return self._tensor.read(start, stop)


def is_dcp(folder: Folder) -> bool:
    """True if torch.distributed.checkpoint wrote this folder."""
    return METADATA in folder and bool(folder.matching("*.distcp"))


class DcpCheckpoint(ChunkedTensors):
    """The model in a folder of torch.distributed.checkpoint; the state dict is chosen as in a torch file.

    Raises UserError if a file is missing, or the metadata is not what DCP writes.
    """

    def __init__(self, folder: Folder, key: str | None = None) -> None:
        where = f"{folder.url}/{METADATA}"
        self._folder, self._opened = folder, dict[str, ByteFile]()
        try:
            content = MetadataUnpickler(folder.bytes(METADATA), _no_storage).load()
            nested = self._nested(content)
        except UserError:
            raise
        except Exception as error:  # a hostile pickle may raise any exception
            why = short(str(error) or type(error).__name__)
            raise UserError(f"{where}: not the metadata of torch.distributed.checkpoint: {why}") from None
        tensors = select(nested, key, where)
        if bad := next((name for name in tensors if not is_name(name)), None):
            raise UserError(f"{where}: the tensor name {ascii(bad)[:80]} is not printable text")
        self.files: list[ByteFile] = [folder.open(METADATA), *self._opened.values()]
        super().__init__(tensors)

    def _nested(self, content: Record) -> dict[str, Any]:
        """The state dict that was saved, with a ChunkedTensor in place of each tensor of a model."""
        tensors, stored, paths = (
            content.get(n) for n in ("state_dict_metadata", "storage_data", "planner_data")
        )
        places: dict[tuple[str, tuple[int, ...]], Record] = {
            (index.get("fqn"), tuple(index.get("offset") or ())): info for index, info in stored.items()
        }
        nested: dict[str, Any] = {}
        for name, described in tensors.items():
            if type(described).__name__ != "TensorStorageMetadata" or NOT_WEIGHTS.search(
                name.partition(".")[0]
            ):
                continue
            path = paths.get(name, (name,)) if isinstance(paths, Mapping) else (name,)
            inner = nested
            for part in path[:-1]:
                inner = inner.setdefault(str(part), {})
            inner[str(path[-1])] = self._tensor(name, described, places)
        return nested

    def _tensor(
        self, name: str, described: Record, places: Mapping[tuple[str, tuple[int, ...]], Record]
    ) -> ChunkedTensor:
        dtype, shape = described.get("properties").state[0], tuple(described.get("size"))
        if dtype not in DTYPES or len(shape) > MAX_DIMENSIONS:
            raise UserError(
                f"{self._folder.url}: {name} has the dtype {short(str(dtype))}, which cannot be merged"
            )
        parts = []
        for chunk in described.get("chunks"):
            offsets, sizes = tuple(chunk.get("offsets")), tuple(chunk.get("sizes"))
            info = places[name, offsets]
            if info.get("transform_descriptors"):
                raise UserError(
                    f"{self._folder.url}: {name} is stored compressed or encrypted; save it without extensions"
                )
            file = self._file(info.get("relative_path"))
            parts.append(
                Part(offsets, sizes, Item(file, info.get("offset"), info.get("length"), dtype, sizes).read)
            )
        return ChunkedTensor(dtype, shape, tuple(parts))

    def _file(self, name: Any) -> ByteFile:
        if not isinstance(name, str) or name not in self._folder:
            raise UserError(f"{self._folder.url}: {short(str(name))} is missing; copy the files of all ranks")
        if name not in self._opened:
            self._opened[name] = self._folder.open(name)
        return self._opened[name]


def _no_storage(*_: Any) -> Any:
    raise ValueError("it contains tensor data")
