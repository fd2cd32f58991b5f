"""Stored numbers in numpy: widened exactly, rounded once to nearest even, block by block into memory that is there.

A block and what is computed from it stay in the second-level cache, so a merge is bound by reading and writing its
files. Integer operations on the bits stand where numpy converts one number at a time (bf16, fp16).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

FLOATS = ("F64", "F32", "F16", "BF16")
ELEMENTS_PER_BLOCK = 1 << 16
"""elements; fewer make Python's share of the time felt, more do not fit the cache"""
ELEMENTS_PER_SPAN = 1 << 21
"""elements that one thread works through: what is hashed as one, and is done or not done after a kill"""
Accumulator = type[np.float32] | type[np.float64]
"""an accumulation type"""
QUIET_NAN = {"F64": 0x7FF8 << 48, "F32": 0x7FC0 << 16, "F16": 0x7E00, "BF16": 0x7FC0}
BITS: dict[np.dtype, np.dtype] = {
    np.dtype(np.float32): np.dtype(np.uint32),
    np.dtype(np.float64): np.dtype(np.uint64),
}
MANTISSA: dict[np.dtype, int] = {np.dtype(np.float32): 23, np.dtype(np.float64): 52}
BIAS: dict[np.dtype, int] = {np.dtype(np.float32): 127, np.dtype(np.float64): 1023}
SIXTEEN_BIT = {"F16": (10, 15), "BF16": (7, 127)}
"""16-bit floats: bits of the mantissa, bias of the exponent"""


class Scratch:
    """Arrays of one thread, made once and used again for every block."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], np.ndarray] = {}

    def take(self, use: str, dtype: type | np.dtype | str, count: int) -> np.ndarray:
        """`count` elements with whatever they last held; the same memory for the same `use` and dtype."""
        kind = np.dtype(dtype)
        key = (use, kind.str)
        held = self._held.get(key)
        if held is None or len(held) < count:
            held = self._held[key] = np.empty(count, kind)
        return held[:count]


def accumulator(dtypes: Sequence[str]) -> Accumulator:
    """fp32 for 16-bit inputs, fp64 as soon as one of them is wider."""
    return np.float32 if all(dtype in SIXTEEN_BIT for dtype in dtypes) else np.float64


def widen_into(out: np.ndarray, chunk: np.ndarray, dtype: str, scratch: Scratch) -> np.ndarray:
    """`chunk` as stored (BF16: its bits, uint16) in the type of `out`, float32 or float64, exactly; returns `out`."""
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
    """Exponent and mantissa shifted to their places in fp32, where they stand for 2**-112 of the number."""
    bits = out.view(np.int32)
    np.copyto(bits, chunk.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, -0x70002000, out=bits)  # 0x8FFFE000: the sign is bit 31, its copies go
    np.multiply(out, np.float32(2.0**112), out=out)
    if len(out) and max(np.maximum.reduce(out), -np.minimum.reduce(out)) >= 65536:  # infinities and NaN
        np.copyto(out, chunk)


def narrow_into(out: np.ndarray, total: np.ndarray, dtype: str, scratch: Scratch) -> None:
    """`total` (float32 or float64; destroyed) rounded once, to nearest even, to the stored form of `dtype`.

    Every NaN becomes the same quiet NaN: which one comes out of an addition differs between processors.
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
    """Rounding done by the adder: to |x| is added the power of two at which one ulp of the sum is one of the result.

    The low bits of the sum then count the result's ulps within its binade; its exponent comes from that of the power.
    Subnormals have the power of the smallest normal number, what is too large that of infinity.
    """
    wide, places = BITS[total.dtype], MANTISSA[total.dtype]
    width, shift, own = wide.itemsize * 8, places - mantissa, BIAS[total.dtype]
    bits = total.view(wide)
    power = scratch.take("power", wide, len(total))
    sign = scratch.take("sign", np.uint16, len(total))
    np.right_shift(bits, width - 16, out=power)
    np.copyto(sign, power, casting="same_kind")
    np.bitwise_and(sign, 0x8000, out=sign)
    np.bitwise_and(bits, (1 << (width - 1)) - 1, out=bits)
    np.minimum(bits, wide.type((own + bias + 1) << places), out=bits)
    np.bitwise_and(bits, wide.type(((1 << (width - 1 - places)) - 1) << places), out=power)
    np.maximum(power, wide.type((own + 1 - bias) << places), out=power)
    np.add(power, wide.type(shift << places), out=power)
    np.add(total, power.view(total.dtype), out=total)
    np.right_shift(power, shift, out=power)
    np.add(bits, power, out=bits)
    np.copyto(out, bits, casting="same_kind")
    np.add(out, np.uint16(-((shift + own + 1 - bias) << mantissa) & 0xFFFF), out=out)
    np.bitwise_or(out, sign, out=out)


def narrow(total: np.ndarray, dtype: str) -> np.ndarray:
    """`narrow_into` for one array, which is left as it is."""
    stored = np.empty(len(total), DTYPES[dtype])
    with np.errstate(all="ignore"):
        narrow_into(stored, total.copy(), dtype, Scratch())
    return stored


def exact_sum(values: Iterable[float]) -> float:
    """Added without rounding, rounded once; by plain additions where infinities are among them or come of them."""
    held = list(values)
    try:
        return math.fsum(held)
    except (ValueError, OverflowError):
        return sum(held)


# In the order in which the reference writer sorts (largest first): dtype -> (numpy storage type, bytes).
# BF16 and the 8-bit floats have no numpy type and travel as their bits.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype("bool"), "U8": np.dtype("u1"), "I8": np.dtype("i1"), "F8_E5M2": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"), "I16": np.dtype("<i2"), "U16": np.dtype("<u2"), "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"), "I32": np.dtype("<i4"), "U32": np.dtype("<u4"), "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"), "I64": np.dtype("<i8"), "U64": np.dtype("<u8"),
}  # fmt: skip
MAX_DIMENSIONS = 64
TensorInfo = tuple[str, tuple[int, ...]]
"""dtype as safetensors spells it, and shape"""


def elements(shape: tuple[int, ...]) -> int:
    return math.prod(shape)
