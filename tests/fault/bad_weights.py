"""Malformed weight files: mutated safetensors headers, pickles and archives."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Header = dict[str, Any]
Mutation = Callable[[np.random.Generator, Header, bytes], bytes]

NASTY: tuple[Any, ...] = (
    -1, -(2**63), 2**31, 2**63 - 1, 2**63, 2**64, 10**40, 0, 1, 1.0, 1.5, 1e300, True, None, "4", "",
    [], [4], {}, {"a": 1},
)  # fmt: skip
DTYPES: tuple[Any, ...] = (
    "F33",
    "f32",
    "",
    "F16",
    "BF16",
    "F64",
    "BOOL",
    "I8",
    "F8_E4M3",
    "F4",
    "C64",
    None,
    4,
    [],
    {},
    "F32 ",
    "\x00",
)
NAMES = (
    "a\nb",
    "a\x1b[31m",
    "a\x00",
    "\ud800",
    "\u202e",
    "x" * 5000,
    "",
    "../a",
    "/etc/passwd",
    "__metadata__",
    "a" * 300,
)


def file_of(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length % 2**64) + text + data


def _tensor(random: np.random.Generator, header: Header) -> str:
    names = [name for name in header if name != "__metadata__"]
    return names[int(random.integers(len(names)))]


def _pick(random: np.random.Generator, choices: Any) -> Any:
    return choices[int(random.integers(len(choices)))]


def offset(random: np.random.Generator, header: Header, data: bytes) -> bytes:
    """Move one end of one tensor: overlaps, holes, beyond the end, before the start."""
    place = header[_tensor(random, header)]["data_offsets"]
    side = int(random.integers(2))
    place[side] += int(_pick(random, (-8, -4, -1, 1, 2, 4, 8, 100, 2**20, 2**40, 2**62, -place[side] - 1)))
    return file_of(header, data)


def both_offsets(random: np.random.Generator, header: Header, data: bytes) -> bytes:
    place = header[_tensor(random, header)]["data_offsets"]
    shift = int(random.integers(-64, 65))
    place[:] = [place[0] + shift, place[1] + shift]
    return file_of(header, data)


def swap(random: np.random.Generator, header: Header, data: bytes) -> bytes:
    """Swap the offsets of two tensors: valid only if they have the same size."""
    a, b = _tensor(random, header), _tensor(random, header)
    header[a]["data_offsets"], header[b]["data_offsets"] = (
        header[b]["data_offsets"],
        header[a]["data_offsets"],
    )
    return file_of(header, data)


def shape(random: np.random.Generator, header: Header, data: bytes) -> bytes:
    sides = header[_tensor(random, header)]["shape"]
    if sides and random.random() < 0.8:
        sides[int(random.integers(len(sides)))] = _pick(random, NASTY)
    else:
        sides += [_pick(random, NASTY) for _ in range(int(random.integers(1, 90)))]
    return file_of(header, data)


def dtype(random: np.random.Generator, header: Header, data: bytes) -> bytes:
    header[_tensor(random, header)]["dtype"] = _pick(random, DTYPES)
    return file_of(header, data)


def entry(random: np.random.Generator, header: Header, data: bytes) -> bytes:
    """Replace a part of an entry, an entry, or the whole header by another value."""
    name = _tensor(random, header)
    key = _pick(random, ("dtype", "shape", "data_offsets"))
    kind = int(random.integers(5))
    if kind == 0:
        del header[name][key]
    elif kind == 1:
        header[name][key] = _pick(random, NASTY)
    elif kind == 2:
        header[name] = _pick(random, NASTY)
    elif kind == 3:
        header[name]["data_offsets"] = [_pick(random, NASTY) for _ in range(int(random.integers(4)))]
    else:
        return file_of(_pick(random, NASTY), data)
    return file_of(header, data)


def name(random: np.random.Generator, header: Header, data: bytes) -> bytes:
    header[_pick(random, NAMES)] = header.pop(_tensor(random, header))
    return file_of(header, data)


def twice(random: np.random.Generator, header: Header, data: bytes) -> bytes:
    """Duplicate a key, among the tensors or inside an entry."""
    text = json.dumps(header)
    key = _tensor(random, header)
    again = json.dumps({key: header[key]})[1:-1]
    if random.random() < 0.5:
        return file_of(f"{text[:-1]}, {again}}}".encode(), data)
    return file_of(text.replace('"dtype"', '"dtype": "I8", "dtype"', 1).encode(), data)


def metadata(random: np.random.Generator, header: Header, data: bytes) -> bytes:
    values = (*NASTY, {"a": {"b": "c"}}, {"a": ["b"]}, {"a": None}, "text", {"a": "b" * 100_000})
    header["__metadata__"] = _pick(random, values)
    return file_of(header, data)


def length(random: np.random.Generator, header: Header, data: bytes) -> bytes:
    size = len(json.dumps(header))
    choices = (
        0,
        1,
        2,
        size - 1,
        size + 1,
        size + len(data),
        size + len(data) + 1,
        10**8,
        10**8 + 1,
        2**31,
        2**63,
        -1,
    )
    return file_of(header, data, int(_pick(random, choices)))


def text(random: np.random.Generator, header: Header, data: bytes) -> bytes:
    """Change one to four bytes of the header text."""
    raw = bytearray(json.dumps(header).encode())
    for place in random.integers(0, len(raw), int(random.integers(1, 5))):
        raw[place] = int(random.integers(256))
    return file_of(bytes(raw), data)


def json_text(random: np.random.Generator, header: Header, data: bytes) -> bytes:
    good = json.dumps(header).encode()
    choices = (
        b"", b"{", b"{}", b"[]", b"null", b"{" * 50_000, b"[" * 200_000, b'{"a":' * 30_000, good[:-1], good + b"}",
        b"\xff\xfe", good.replace(b'"F32"', b"NaN"), good.replace(b"[", b"[Infinity,", 1),
        good.replace(b"}", b",}", 1), b"\xef\xbb\xbf" + good,
        b" " * 1000 + good, good + b" " * 1000, good + b"\x00" * 8, good.decode().encode("utf-16"), b"9" * 6000,
        good.replace(b"[", b"[" + b"9" * 5000 + b",", 1), b'"' + b"a" * 100_000,
    )  # fmt: skip
    return file_of(_pick(random, choices), data)


def cut(random: np.random.Generator, header: Header, data: bytes) -> bytes:
    whole = file_of(header, data)
    return whole[: int(random.integers(0, len(whole)))]


def longer(random: np.random.Generator, header: Header, data: bytes) -> bytes:
    return file_of(header, data) + random.bytes(int(random.integers(1, 40)))


MUTATIONS: tuple[Mutation, ...] = (
    offset, both_offsets, swap, shape, dtype, entry, name, twice, metadata, length, text, json_text, cut, longer
)  # fmt: skip


class Call:
    """An object that pickles as a call of `function` with `args`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


class Stored:
    """An object that pickles as a torch storage with this key and number of elements."""

    def __init__(self, key: Any, count: Any, kind: Any) -> None:
        self.id = "storage", kind, key, "cpu", count


def torch_pickle(content: Any, protocol: int = 2) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.id if isinstance(obj, Stored) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump(content)
    return buffer.getvalue()


def archive(
    path: Path, pickled: bytes, storages: Mapping[str, bytes] | None = None, compress: bool = False
) -> Path:
    """An archive in the layout of torch.save."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", "little")
        for key, data in (storages or {}).items():
            file.writestr(f"archive/data/{key}", data)
    return path
