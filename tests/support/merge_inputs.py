"""Small weights for the merge tests, written by the reference libraries, not by the code under test."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

Arrays = Mapping[str, np.ndarray]


def floats(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def write(folder: Path, tensors: Arrays, name: str = "model.safetensors") -> Path:
    """Write a folder with one file, with the safetensors library."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / name, metadata={"format": "pt"})
    return folder


def write_bf16(folder: Path, tensors: Arrays) -> Path:
    """Write fp32 arrays truncated to bf16 (any 16 bits are possible) into a file laid out by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, object] = {}
    data = b""
    for name, array in tensors.items():
        bits = bf16_bits(array).tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(bits)],
        }
        data += bits
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


def bf16_bits(array: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def read_bytes(path: Path) -> dict[str, bytes]:
    """Name -> stored bytes of a safetensors file, parsed independently of the code under test."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    base = 8 + length
    return {
        name: raw[base + entry["data_offsets"][0] : base + entry["data_offsets"][1]]
        for name, entry in header.items()
    }
