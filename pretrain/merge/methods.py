"""Arithmetic on flat chunks: widen, combine, round once. Pure functions of numpy arrays; same bits for any chunking."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pretrain.merge.safetensors_io import DTYPES

FLOATS = ("F64", "F32", "F16", "BF16")


def accumulator(dtypes: Sequence[str]) -> type[np.float32] | type[np.float64]:
    """fp32 for 16-bit inputs, fp64 as soon as one of them is wider."""
    return np.float32 if all(dtype in ("F16", "BF16") for dtype in dtypes) else np.float64


def widen(chunk: np.ndarray, dtype: str, into: type[np.float32] | type[np.float64]) -> np.ndarray:
    """A chunk as stored in the accumulation type, exactly; BF16 comes as uint16 bits."""
    if dtype == "BF16":
        wide = chunk.astype(np.uint32)
        wide <<= 16
        chunk = wide.view(np.float32)
    return chunk.astype(into, copy=False)


def narrow(total: np.ndarray, dtype: str) -> np.ndarray:
    """Round to nearest even, once, to the stored form of `dtype`; every NaN becomes the same quiet NaN."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if dtype == "BF16":
            return _to_bf16(total)
        stored = total.astype(DTYPES[dtype])
    stored[np.isnan(stored)] = np.nan  # which NaN comes out of an addition differs between processors
    return stored


def _to_bf16(total: np.ndarray) -> np.ndarray:
    bits = (_to_odd(total) if total.dtype == np.float64 else total).view(np.uint32)
    rounded = (bits >> 16) & 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    stored = rounded.astype(np.uint16)
    stored[np.isnan(total)] = 0x7FC0
    return stored


def _to_odd(total: np.ndarray) -> np.ndarray:
    """fp64 to fp32, inexact results to the neighbour with an odd last bit, so that rounding again rounds only once."""
    near = total.astype(np.float32)
    bits = near.view(np.uint32)
    back = near.astype(np.float64)
    fix = (back != total) & (bits & 1 == 0) & ~np.isnan(total)
    bits[fix & (np.abs(back) > np.abs(total))] -= 1
    bits[fix & (np.abs(back) < np.abs(total))] += 1
    return near


def linear(
    chunks: Sequence[np.ndarray], dtypes: Sequence[str], weights: Sequence[float], out: str
) -> np.ndarray:
    """sum_i w_i x_i, stored as `out`.

    Each fp64 weight is rounded once to the accumulation type; each product is rounded, then added in the order
    given, without FMA; the sum is rounded once to `out`.
    """
    kind = accumulator(dtypes)
    return combine([widen(c, d, kind) for c, d in zip(chunks, dtypes, strict=True)], weights, kind, out)


def combine(
    wide: Sequence[np.ndarray], weights: Sequence[float], kind: type[np.float32] | type[np.float64], out: str
) -> np.ndarray:
    """`linear` after widening, so that a sweep widens each chunk once for all its betas."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        total = wide[0] * kind(weights[0])
        product = np.empty_like(total)
        for chunk, weight in zip(wide[1:], weights[1:], strict=True):
            np.multiply(chunk, kind(weight), out=product)
            total += product
    return narrow(total, out)
