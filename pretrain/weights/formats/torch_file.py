"""torch.save files without torch: tensors are read in place, and `StateDict` finds the state dict in a checkpoint."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from pretrain.weights.byte_file import ByteFile, open_file
from pretrain.weights.dtypes import TensorInfo
from pretrain.weights.formats.safetensors_file import is_name, short
from pretrain.weights.formats.torch_pickle import Unpickler
from pretrain.weights.formats.torch_tensor import Storage, Tensor
from pretrain.weights.formats.zip_directory import STORED, ZipDirectory

MAX_PICKLE = 64 << 20
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "module")
DDP_PREFIX = "module."  # DistributedDataParallel adds it to every name; open_clip's checkpoints keep it


class TorchFile:
    """One torch.save file in the zip format. `content` is the saved object with `Tensor`s in place of tensors.

    Raises UserError with the file's name for anything that torch.save does not write, and for the format of torch
    before 1.6.
    """

    def __init__(self, file: ByteFile | Path | str) -> None:
        self.file = open_file(file) if isinstance(file, Path | str) else file
        self.name = self.file.name
        self._lock = threading.Lock()
        self._last_strided: tuple[Tensor, np.ndarray] | None = None
        try:
            self.directory = self._archive()
            entries = self.directory.entries
            pickled = [name for name in entries if name.endswith("/data.pkl")]
            if len(pickled) != 1:
                raise ValueError("it does not hold exactly one data.pkl")
            self._root = pickled[0].removesuffix("data.pkl")
            if f"{self._root}constants.pkl" in entries:
                raise ValueError("it is a TorchScript model; save its state_dict() instead")
            order = self._member("byteorder") if self._root + "byteorder" in entries else b""
            if order not in (b"", b"little"):
                raise ValueError(f"its byte order is {order[:20].decode(errors='replace')}, not little")
            self.content = Unpickler(self._member("data.pkl"), self._locate).load()
        except (UserError, OSError):
            raise
        except Exception as error:  # a hostile pickle may raise any exception
            raise self.refused(error) from None

    def refused(self, error: Exception) -> UserError:
        """The UserError for a file that is not what torch.save writes."""
        why = short(str(error) or type(error).__name__)
        return UserError(f"{self.name}: refused: {why}; only files written by torch.save can be read")

    def read_strided_cached(self, tensor: Tensor) -> np.ndarray:
        """All elements of a strided remote tensor, flat. Caches the last tensor, because a tensor is read in chunks."""
        with self._lock:
            if self._last_strided is None or self._last_strided[0] is not tensor:
                self._last_strided = tensor, tensor.strided().reshape(-1)
            return self._last_strided[1]

    def _archive(self) -> ZipDirectory:
        if self.file.peek(0, min(2, self.file.size))[:1] == b"\x80":
            raise ValueError("it has the format of torch before 1.6; load it with torch and save it again")
        return ZipDirectory(self.file)

    def _member(self, name: str) -> bytes:
        entry = self.directory.entries[self._root + name]
        if entry.size > MAX_PICKLE:
            raise ValueError(f"its {name} has {entry.size:,} bytes, more than {MAX_PICKLE:,}")
        start = self.directory.start(entry)
        return self.file.peek(start, start + entry.size)

    def _locate(self, key: str, dtype: str, nbytes: int) -> Storage:
        entry = self.directory.entries.get(f"{self._root}data/{key}")
        if entry is None or entry.method != STORED:
            raise ValueError(f"storage {key} is missing or compressed")
        if nbytes < 0 or nbytes > entry.size:
            raise ValueError(f"storage {key} is shorter than its tensors; the file may be truncated")
        storage = Storage(self, entry, nbytes, dtype)
        if not self.file.remote:
            self.directory.start(entry)
        return storage


class StateDict:
    """A flat state dict at the top level of a file or under one of STATE_DICT_KEYS.

    tied: name that shares its memory with an earlier tensor -> name of that tensor; tied names are not in `names()`.
    """

    def __init__(self, file: ByteFile | Path | str) -> None:
        archive = TorchFile(file)
        content: Any = archive.content
        for _ in STATE_DICT_KEYS:
            inner = next(
                (
                    content[k]
                    for k in STATE_DICT_KEYS
                    if isinstance(content, dict) and _is_dict(content.get(k))
                ),
                None,
            )
            if inner is None:
                break
            content = inner
        if not isinstance(content, dict):
            raise UserError(
                f"{archive.name}: contains no state dict; write a file with `torch.save(model.state_dict(), ...)`"
            )
        found = {name: value for name, value in content.items() if isinstance(value, Tensor)}
        if not found:
            raise UserError(
                f"{archive.name}: contains no tensors at the top level or under {', '.join(STATE_DICT_KEYS)}; "
                "put the state dict there"
            )
        for name in found:
            if not is_name(name):
                raise UserError(f"{archive.name}: the tensor name {ascii(name)[:80]} is not printable text")
        if all(name.startswith(DDP_PREFIX) for name in found):
            found = {name.removeprefix(DDP_PREFIX): value for name, value in found.items()}
        self.tied: dict[str, str] = {}
        self._tensors: dict[str, Tensor] = {}
        first: dict[object, str] = {}
        for name, tensor in found.items():
            if tensor.numel and (same := first.setdefault(tensor.memory_key, name)) != name:
                self.tied[name] = same
            else:
                self._tensors[name] = tensor

    def names(self) -> list[str]:
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        return self._tensors[name].dtype, self._tensors[name].shape

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._tensors[name].read(start, stop)


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict) and len(value) > 0
