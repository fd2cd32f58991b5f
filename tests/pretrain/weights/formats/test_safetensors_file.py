"""The safetensors layout compared with the reference library, and malformed headers that must be refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from data_pipeline.errors import UserError
from pretrain.weights.dtypes import elements
from pretrain.weights.formats.safetensors_file import SafetensorsFile, layout

TENSORS = {
    "z.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.weight": np.arange(5, dtype=np.float16),
    "count": np.array([1, 2**40], dtype=np.int64),
    "mask": np.array([True, False, True]),
    "bytes": np.arange(7, dtype=np.uint8),
    "scalar": np.array(3.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "wide": np.array([1e300], np.float64),
    "é": np.ones(1, np.int32),
}
NAMES = {"f4": "F32", "f2": "F16", "i8": "I64", "b1": "BOOL", "u1": "U8", "f8": "F64", "i4": "I32"}


def test_layout_is_the_reference_writer_s() -> None:
    infos = {name: (NAMES[a.dtype.str[1:]], a.shape) for name, a in TENSORS.items()}
    header, offsets = layout(infos, {"format": "pt"})
    end = max(offsets[n] + a.nbytes for n, a in TENSORS.items())
    mine = bytearray(max(len(header), end))
    mine[: len(header)] = header
    for name, array in TENSORS.items():
        mine[offsets[name] : offsets[name] + array.nbytes] = array.tobytes()
    assert bytes(mine) == save(TENSORS, metadata={"format": "pt"})


def test_every_dtype_of_the_reference_library(tmp_path: Path) -> None:
    """Each dtype that torch and safetensors write is read and laid out as there; packed ones are named."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save as save_torch

    names = [
        "bool", "uint8", "int8", "float8_e5m2", "float8_e4m3fn", "float8_e8m0fnu", "float8_e4m3fnuz",
        "float8_e5m2fnuz", "int16", "uint16", "float16", "bfloat16", "int32", "uint32", "float32", "complex64",
        "float64", "int64", "uint64",
    ]  # fmt: skip
    raw = torch.arange(16, dtype=torch.uint8) % 2
    tensors = {name: raw.clone().view(getattr(torch, name)) for name in names}
    path = tmp_path / "m.safetensors"
    path.write_bytes(save_torch(tensors, {"format": "pt"}))
    file = SafetensorsFile(path)
    for name in names:
        assert file.read(name, 0, elements(file.info(name)[1])).tobytes() == bytes(raw.tolist())
    assert layout({name: file.info(name) for name in names}, {"format": "pt"})[0] == file.header
    path.write_bytes(save_torch({"packed": raw.view(torch.float4_e2m1fn_x2)}))
    with pytest.raises(
        UserError, match="packed has the dtype F4, codes of 4 bits of a quantised model"
    ) as error:
        SafetensorsFile(path)
    assert "truncated" not in str(error.value)


def test_layout_does_not_depend_on_the_order_given() -> None:
    infos = dict.fromkeys("cab", ("F32", (2,)))
    assert layout(infos, {}) == layout(dict(sorted(infos.items())), {})


def test_every_tensor_is_aligned_to_its_type() -> None:
    infos = {
        f"t{i}": (dtype, (3,)) for i, dtype in enumerate(["U8", "F32", "BOOL", "F64", "F16", "BF16", "I64"])
    }
    sizes = {"U8": 1, "BOOL": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I64": 8}
    _, offsets = layout(infos, {"format": "pt"})
    assert all(offsets[name] % sizes[dtype] == 0 for name, (dtype, _) in infos.items())


def test_reads_what_the_reference_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(save(TENSORS))
    mine = SafetensorsFile(path)
    for name, expected in load_file(path).items():
        dtype, shape = mine.info(name)
        assert (dtype, shape) == (NAMES[expected.dtype.str[1:]], expected.shape)
        np.testing.assert_array_equal(mine.read(name, 0, expected.size), expected.ravel())
    np.testing.assert_array_equal(mine.read("z.weight", 2, 5), [2, 3, 4])


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, dtype: str = "F32", shape: object = None) -> dict[str, object]:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    }


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "header"),
        (b"\x01", "header"),
        (raw({"a": entry(0, 4)}, b"1234", length=2**60), "header"),
        (raw({"a": entry(0, 4)}, b"1234", length=0), "header"),
        (raw(b'{"a": '), "Expecting"),
        (raw(b"\xff\xfe"), "utf-8"),
        (raw(b"[1, 2]"), "not a JSON object"),
        (raw(b'{"a": 1, "a": 2}'), "twice"),
        (raw(b"[" * 20000), "recursion"),
        (raw({"a": entry(0, 4)}, b"123"), "the file ends at"),
        (raw({"a": entry(0, 4)}, b"12345"), "the file ends at"),
        (raw({"a": entry(4, 8)}, b"12345678"), "starts at byte 4"),
        (raw({"a": entry(0, 8), "b": entry(4, 12)}, b"1" * 12), "starts at byte 4"),
        (raw({"a": entry(0, 4, "F33")}, b"1234"), "unknown dtype"),
        (raw({"a": entry(0, 4, shape=[2])}, b"1234"), "does not take"),
        (raw({"a": entry(0, 4, shape=[-1, -1])}, b"1234"), "integers"),
        (raw({"a": entry(0, 4, shape=[1.0])}, b"1234"), "integers"),
        (raw({"a": entry(0, 4, shape=[True])}, b"1234"), "integers"),
        (raw({"a": entry(8, 4, shape=[1])}, b"1234"), "does not take"),
        (raw({"a": {"dtype": "F32"}}, b"1234"), "must have dtype"),
        (raw({"a": 7}, b"1234"), "must have dtype"),
    ],
)
def test_malformed_file_is_one_user_error_that_names_it(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"bad\.safetensors: not a safetensors file.*(?i:{why})"):
        SafetensorsFile(path)
