"""torch.save files without torch: tensors are read in place."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from pretrain.weights.byte_file import ByteFile, open_file
from pretrain.weights.formats.safetensors_file import short
from pretrain.weights.formats.torch_pickle import NotNeeded, Unpickler
from pretrain.weights.formats.torch_tensor import Storage, Tensor
from pretrain.weights.formats.zip_directory import STORED, ZipDirectory

MAX_PICKLE = 64 << 20


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
        if isinstance(error, NotNeeded):
            return UserError(
                f"{self.name}: refused: {why}; if you trust the file, load it with torch and save its "
                "state_dict() alone"
            )
        return UserError(f"{self.name}: refused: {why}; only files written by torch.save can be read")

    def read_strided_cached(self, tensor: Tensor) -> np.ndarray:
        """All elements of a strided remote tensor, flat. Caches the last tensor, because a tensor is read in chunks."""
        with self._lock:
            if self._last_strided is None or self._last_strided[0] is not tensor:
                self._last_strided = tensor, np.ascontiguousarray(tensor.strided()).reshape(-1)
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
