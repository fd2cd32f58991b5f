"""Safetensors without torch: a validated header, tensors as views of the file, and a byte-deterministic layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from pretrain.weights.byte_file import ByteFile, open_file
from pretrain.weights.dtypes import DTYPES, MAX_DIMENSIONS, PACKED_DTYPES, TensorInfo, elements

DTYPE_ORDER = {dtype: place for place, dtype in enumerate(DTYPES)}
MAX_HEADER = 100_000_000  # as in the reference library
FIRST_READ_BYTES = 1 << 16  # one read of this size holds most headers completely


class SafetensorsFile:
    """One local or remote file; reading a tensor reads only the bytes of that tensor.

    Raises UserError with the file's name if it is not a well-formed safetensors file.
    """

    def __init__(self, file: ByteFile | Path | str) -> None:
        self._file = open_file(file) if isinstance(file, Path | str) else file
        self.path = Path(self._file.name) if not self._file.remote else self._file.name
        self.size = self._file.size
        start = self._file.peek(0, min(self.size, FIRST_READ_BYTES))
        length = int.from_bytes(start[:8], "little")
        if len(start) < 8 or not 2 <= length <= min(MAX_HEADER, self.size - 8):
            raise self._broken(f"its header length is {length} bytes in a file of {self.size} bytes")
        self._base = 8 + length
        rest = self._file.peek(len(start), self._base) if self._base > len(start) else b""
        self.header = (start + rest)[: self._base]
        self.metadata, self._entries = self._parse(self.header[8:])

    def names(self) -> list[str]:
        return list(self._entries)

    def info(self, name: str) -> TensorInfo:
        dtype, shape, _ = self._entries[name]
        return dtype, shape

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the flat tensor: a read-only view in the storage type (BF16 as uint16 bits)."""
        dtype, _, offset = self._entries[name]
        kind = DTYPES[dtype]
        at = self._base + offset + start * kind.itemsize
        return np.frombuffer(self._file.read(at, at + (stop - start) * kind.itemsize), kind)

    def _broken(self, why: str) -> UserError:
        return UserError(
            f"{self.path}: not a safetensors file: {short(why)}; it may be truncated; download or write it again"
        )

    def _parse(self, raw: bytes) -> tuple[dict[str, str], dict[str, tuple[str, tuple[int, ...], int]]]:
        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            keys = dict(pairs)
            if len(keys) != len(pairs):
                raise ValueError("a name occurs twice in the header")
            return keys

        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
        except (ValueError, RecursionError, MemoryError) as error:
            raise self._broken(str(error) or type(error).__name__) from None
        if not isinstance(header, dict):
            raise self._broken("its header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._broken("its __metadata__ is not a map of strings")
        entries = {name: self._entry(name, entry) for name, entry in header.items()}
        at = 0
        places = {
            n: (at, at + elements(shape) * DTYPES[dtype].itemsize)
            for n, (dtype, shape, at) in entries.items()
        }
        for name, (start, stop) in sorted(places.items(), key=lambda item: item[1]):
            if start != at:
                raise self._broken(
                    f"{name} starts at byte {start}, but the previous tensor ends at byte {at}"
                )
            at = stop
        if self._base + at != self.size:
            raise self._broken(
                f"its tensors end at byte {self._base + at}, but the file ends at byte {self.size}"
            )
        return metadata, entries

    def _entry(self, name: str, entry: Any) -> tuple[str, tuple[int, ...], int]:
        if not is_name(name):
            raise self._broken(f"the name {short(ascii(name))} contains unprintable characters")
        try:
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise self._broken(f"{name}: its entry must have dtype, shape and two data_offsets") from None
        if isinstance(dtype, str) and dtype in PACKED_DTYPES:
            raise UserError(
                f"{self.path}: {name} has the dtype {dtype}, codes of {PACKED_DTYPES[dtype]} bits of a quantised "
                "model, which cannot be read as numbers; name the weights before quantisation"
            )
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._broken(f"{name}: unknown dtype {dtype!r}")
        if not all(type(number) is int and 0 <= number < 1 << 63 for number in (*shape, begin, end)):
            raise self._broken(
                f"{name}: shape and offsets must be integers of at least 0, not {shape}, {begin}, {end}"
            )
        if len(shape) > MAX_DIMENSIONS:
            raise self._broken(f"{name}: its shape has {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
        if end - begin != elements(shape) * DTYPES[dtype].itemsize:
            raise self._broken(f"{name}: {dtype} of shape {list(shape)} does not take {end - begin} bytes")
        return dtype, shape, begin


def is_name(name: Any) -> bool:
    """True if `name` is a valid tensor name: printable text of at most 4096 characters."""
    return isinstance(name, str) and len(name) <= 4096 and name.isprintable()


def short(text: str) -> str:
    """`text` as one printable line of at most 300 characters, for messages that quote untrusted files."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text[:2000].split()))
    return line if len(line) <= 300 else line[:297] + "..."


def layout(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return the header bytes (with the length prefix) of a file with these tensors, and each tensor's byte offset.

    Sorts by dtype, widest first, then by name, as the reference implementation does: every tensor is aligned to its
    dtype, and equal tensors give equal bytes.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    offsets: dict[str, int] = {}
    for name in sorted(tensors, key=lambda name: (-DTYPE_ORDER[tensors[name][0]], name)):
        dtype, shape = tensors[name]
        length = elements(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + length]}
        offsets[name] = at
        at += length
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: base + offset for name, offset in offsets.items()}
