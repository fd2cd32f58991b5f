"""Stored dtypes in numpy: exact widening and one rounding to nearest even, block by block into preallocated arrays.

A block and its intermediate results fit the L2 cache, so file I/O limits the speed of a merge, not computation. bf16
and fp16 are converted with integer operations on their bits, because numpy converts them one element at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

FLOATS = ("F64", "F32", "F16", "BF16")
ELEMENTS_PER_BLOCK = 1 << 16  # with fewer, Python's overhead is noticeable; more do not fit the L2 cache
ELEMENTS_PER_SPAN = 1 << 21  # the unit of one thread, of hashing and of resuming a killed merge
Accumulator = type[np.float32] | type[np.float64]
QUIET_NAN = {"F64": 0x7FF8 << 48, "F32": 0x7FC0 << 16, "F16": 0x7E00, "BF16": 0x7FC0}
BITS: dict[np.dtype, np.dtype] = {
    np.dtype(np.float32): np.dtype(np.uint32),
    np.dtype(np.float64): np.dtype(np.uint64),
}
MANTISSA: dict[np.dtype, int] = {np.dtype(np.float32): 23, np.dtype(np.float64): 52}
BIAS: dict[np.dtype, int] = {np.dtype(np.float32): 127, np.dtype(np.float64): 1023}
SIXTEEN_BIT = {"F16": (10, 15), "BF16": (7, 127)}  # bits of the mantissa, bias of the exponent


class Scratch:
    """Preallocated arrays of one thread, reused for every block."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, str], np.ndarray] = {}

    def take(self, use: str, dtype: type | np.dtype | str, count: int) -> np.ndarray:
        """`count` uninitialised elements; the same `use` and dtype return the same memory."""
        kind = np.dtype(dtype)
        key = (use, kind.str)
        array = self._arrays.get(key)
        if array is None or len(array) < count:
            array = self._arrays[key] = np.empty(count, kind)
        return array[:count]


def accumulator(dtypes: Sequence[str]) -> Accumulator:
    """fp32 if all inputs are 16-bit floats, else fp64."""
    return np.float32 if all(dtype in SIXTEEN_BIT for dtype in dtypes) else np.float64


def widen_into(out: np.ndarray, chunk: np.ndarray, dtype: str, scratch: Scratch) -> np.ndarray:
    """Widen the stored `chunk` (BF16: its bits as uint16) exactly into the float32 or float64 `out`; return `out`."""
    narrow = out if out.dtype == np.float32 else scratch.take("narrow", np.float32, len(out))
    if dtype == "BF16":
        bits = narrow.view(np.uint32)
        np.copyto(bits, chunk)
        np.left_shift(bits, 16, out=bits)
    elif dtype == "F16":
        _widen_fp16(narrow, chunk)
    else:
        np.copyto(out, chunk)
        return out
    if narrow is not out:
        np.copyto(out, narrow)
    return out


def _widen_fp16(out: np.ndarray, chunk: np.ndarray) -> None:
    """Shift exponent and mantissa to their fp32 positions, which gives 2**-112 times the number; then scale."""
    bits = out.view(np.int32)
    np.copyto(bits, chunk.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, -0x70002000, out=bits)  # 0x8FFFE000: keep the sign in bit 31, clear its copies
    np.multiply(out, np.float32(2.0**112), out=out)
    if len(out) and max(np.maximum.reduce(out), -np.minimum.reduce(out)) >= 65536:  # infinities and NaN
        np.copyto(out, chunk)


def narrow_into(out: np.ndarray, total: np.ndarray, dtype: str, scratch: Scratch) -> None:
    """Round `total` (float32 or float64; overwritten) once, to nearest even, to the stored form of `dtype` in `out`.

    Every NaN becomes the same quiet NaN, because the NaN that an addition returns differs between processors.
    """
    nan = np.isnan(total) if len(total) and np.isnan(np.maximum.reduce(total)) else None
    if dtype == "BF16" and total.dtype == np.float32:
        _narrow_bf16(out, total, scratch)
    elif dtype in SIXTEEN_BIT:
        _narrow_small(out.view(np.uint16), total, *SIXTEEN_BIT[dtype], scratch)
    else:
        np.copyto(out, total, casting="same_kind")
    if nan is not None:
        out.view(f"u{out.itemsize}")[nan] = QUIET_NAN[dtype]


def _narrow_bf16(out: np.ndarray, total: np.ndarray, scratch: Scratch) -> None:
    bits = total.view(np.uint32)
    odd = scratch.take("odd", np.uint32, len(total))
    np.right_shift(bits, 16, out=odd)
    np.bitwise_and(odd, 1, out=odd)
    np.add(odd, 0x7FFF, out=odd)
    np.add(bits, odd, out=bits)
    np.right_shift(bits, 16, out=bits)
    np.copyto(out, bits, casting="same_kind")


def _narrow_small(out: np.ndarray, total: np.ndarray, mantissa: int, bias: int, scratch: Scratch) -> None:
    """Round |x| with one float addition: add a power of two so that the sum's last bit is the result's last bit.

    The low bits of the sum are then the result's mantissa; the result's exponent comes from the power's exponent.
    Subnormals use the power of the smallest normal number, overflows the power of infinity.
    """
    wide, wide_mantissa = BITS[total.dtype], MANTISSA[total.dtype]
    width, shift, wide_bias = wide.itemsize * 8, wide_mantissa - mantissa, BIAS[total.dtype]
    bits = total.view(wide)
    power = scratch.take("power", wide, len(total))
    sign = scratch.take("sign", np.uint16, len(total))
    np.right_shift(bits, width - 16, out=power)
    np.copyto(sign, power, casting="same_kind")
    np.bitwise_and(sign, 0x8000, out=sign)
    np.bitwise_and(bits, (1 << (width - 1)) - 1, out=bits)
    np.minimum(bits, wide.type((wide_bias + bias + 1) << wide_mantissa), out=bits)
    np.bitwise_and(bits, wide.type(((1 << (width - 1 - wide_mantissa)) - 1) << wide_mantissa), out=power)
    np.maximum(power, wide.type((wide_bias + 1 - bias) << wide_mantissa), out=power)
    np.add(power, wide.type(shift << wide_mantissa), out=power)
    np.add(total, power.view(total.dtype), out=total)
    np.right_shift(power, shift, out=power)
    np.add(bits, power, out=bits)
    np.copyto(out, bits, casting="same_kind")
    np.add(out, np.uint16(-((shift + wide_bias + 1 - bias) << mantissa) & 0xFFFF), out=out)
    np.bitwise_or(out, sign, out=out)


def narrow(total: np.ndarray, dtype: str) -> np.ndarray:
    """`narrow_into` a new array; `total` is not modified."""
    stored = np.empty(len(total), DTYPES[dtype])
    with np.errstate(all="ignore"):
        narrow_into(stored, total.copy(), dtype, Scratch())
    return stored


def exact_sum(values: Iterable[float]) -> float:
    """The sum of `values`, rounded once. Falls back to plain addition for infinities and overflows."""
    listed = list(values)
    try:
        return math.fsum(listed)
    except (ValueError, OverflowError):
        return sum(listed)


# dtype -> numpy storage type, in reverse order of the reference writer, which writes U64 first.
# BF16 and the 8-bit floats have no numpy type and are stored as their bits.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype("bool"), "U8": np.dtype("u1"), "I8": np.dtype("i1"), "F8_E5M2": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"), "F8_E8M0": np.dtype("u1"), "F8_E4M3FNUZ": np.dtype("u1"),
    "F8_E5M2FNUZ": np.dtype("u1"), "I16": np.dtype("<i2"), "U16": np.dtype("<u2"), "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"), "I32": np.dtype("<i4"), "U32": np.dtype("<u4"), "F32": np.dtype("<f4"),
    "C64": np.dtype("<c8"), "F64": np.dtype("<f8"), "I64": np.dtype("<i8"), "U64": np.dtype("<u8"),
}  # fmt: skip
# Dtypes of safetensors whose elements are no whole bytes: codes of quantised weights.
PACKED_DTYPES = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # bits of an element
MAX_DIMENSIONS = 64
TensorInfo = tuple[str, tuple[int, ...]]  # dtype in safetensors spelling, shape


def elements(shape: tuple[int, ...]) -> int:
    """Number of elements of a shape."""
    return math.prod(shape)
