"""The arithmetic of a linear merge against a scalar reference in exact rational numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pretrain.weights.dtypes import DTYPES, Scratch, accumulator, narrow, widen_into
from tests.support.merge_jobs import linear

# (precision in bits, smallest exponent, largest exponent)
FORMATS = {"F64": (53, -1022, 1023), "F32": (24, -126, 127), "F16": (11, -14, 15), "BF16": (8, -126, 127)}
BITS = {"F64": np.uint64, "F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}


def rounded(value: Fraction, fmt: str) -> Fraction | float:
    """`value` rounded to a binary format: to nearest, ties to even; infinity above the largest number."""
    precision, low, high = FORMATS[fmt]
    if value == 0:
        return value
    exponent = max(low, _exponent(abs(value)))
    step = Fraction(2) ** (exponent - precision + 1)
    result = round(value / step) * step  # Python rounds a Fraction half to even
    if abs(result) >= Fraction(2) ** (high + 1):
        return math.copysign(math.inf, value)
    return result


def _exponent(value: Fraction) -> int:
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= value else exponent - 1


def reference(values: list[float], weights: list[float], inputs: str, out: str) -> Fraction | float:
    kind = "F32" if inputs in ("F16", "BF16") else "F64"
    total: Fraction | float | None = None
    for value, weight in zip(values, weights, strict=True):
        product = rounded(_exact(rounded(Fraction(weight), kind)) * Fraction(value), kind)
        if not isinstance(product, Fraction):
            return math.nan  # overflows the accumulation type: covered by the tests on infinities
        total = product if total is None else rounded(_exact(total) + product, kind)
        if not isinstance(total, Fraction):
            return math.nan
    return rounded(_exact(total), out)


def _exact(value: Fraction | float | None) -> Fraction:
    assert isinstance(value, Fraction)
    return value


def stored(bits: int, fmt: str) -> np.ndarray:
    return np.array([bits], BITS[fmt]).view(DTYPES[fmt])


def value_of(array: np.ndarray, fmt: str) -> float:
    return float((array.astype(np.uint32) << 16).view(np.float32)[0] if fmt == "BF16" else array[0])


@given(
    fmt=st.sampled_from(["F64", "F32", "F16", "BF16"]),
    out=st.sampled_from(["same", "F64", "F32", "BF16", "F16"]),
    bits=st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=4),
    shares=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
    near=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_linear_is_the_stated_formula(
    fmt: str, out: str, bits: list[int], shares: list[float], near: bool
) -> None:
    width = DTYPES[fmt].itemsize * 8
    if near:  # close to each other, as checkpoints of one run are
        bits = [bits[0] ^ (b & 7) for b in bits]
    arrays = [stored(b & (2**width - 1), fmt) for b in bits]
    values = [value_of(a, fmt) for a in arrays]
    if not all(map(math.isfinite, values)):
        return
    weights = shares[: len(arrays)]
    out = fmt if out == "same" else out
    expected = reference(values, weights, fmt, out)
    if isinstance(expected, float) and math.isnan(expected):
        return
    got = value_of(linear(arrays, [fmt] * len(arrays), weights, out), out)
    assert got == expected


@given(
    fmt=st.sampled_from(["F32", "F16", "BF16"]),
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=3),
    beta=st.floats(0, 1),
    near=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_an_ulp_from_exact_sums_or_a_small_part_of_the_largest_term(
    fmt: str, bits: list[int], beta: float, near: bool
) -> None:
    """The error is at most one ulp of the output, or 2**-22 of the largest term if terms cancel.

    Holds for weights that are normal in fp32, so not between 0 and 2**-126.
    """
    assume(beta == 0 or fmt == "F32" or beta >= 2.0**-126)
    if near:
        bits = [bits[0] ^ (b & 15) for b in bits]
    arrays = [stored(b & (2 ** (DTYPES[fmt].itemsize * 8) - 1), fmt) for b in bits]
    values = [value_of(array, fmt) for array in arrays]
    weights = [beta, 1 - beta, -0.25][: len(values)]
    if not all(map(math.isfinite, values)):
        return
    terms = [Fraction(w) * Fraction(v) for w, v in zip(weights, values, strict=True)]
    exact = sum(terms, Fraction(0))
    expected = rounded(exact, fmt)
    precision, low, high = FORMATS[fmt]
    if not isinstance(expected, Fraction) or max(map(abs, terms)) >= Fraction(2) ** high:
        return
    got = Fraction(value_of(linear(arrays, [fmt] * len(arrays), weights, fmt), fmt))
    exponent = max(low, _exponent(abs(exact))) if exact else low
    ulp = Fraction(2) ** (exponent - precision + 1)
    assert abs(got - exact) <= max(ulp, max(map(abs, terms)) / 2**22)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_narrowing_to_bf16_rounds_once(kind: type) -> None:
    """Values around every tie of a few exponents, including those that fp64 -> fp32 -> bf16 rounds wrongly."""
    ties = [
        Fraction(2 * m + 1, 2) * Fraction(2) ** e for m in range(128, 256) for e in (-140, -133, -20, 0, 60)
    ]
    shift = [Fraction(0), Fraction(1, 2**40), -Fraction(1, 2**40), Fraction(1, 2**12), -Fraction(1, 2**12)]
    edges = [3.4e38, 3.39e38, 1e-45, 0.0] + ([1e39] if kind is np.float64 else [])
    values: np.ndarray = np.array([float(t + t * s) for t in ties for s in shift] + edges).astype(kind)
    values = np.concatenate([values, -values])
    values = values[np.isfinite(values)]
    got = (narrow(values, "BF16").astype(np.uint32) << 16).view(np.float32)
    expected = [float(rounded(Fraction(float(v)), "BF16")) for v in values]
    np.testing.assert_array_equal(got, np.array(expected, np.float32))
    assert not np.array_equal(np.signbit(got), np.zeros_like(got, bool))


def test_bf16_agrees_with_torch_on_every_exponent() -> None:
    torch = pytest.importorskip("torch")
    high = np.arange(2**16, dtype=np.uint32) << 16
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (high | np.uint32(low)).view(np.float32)
        expected = torch.from_numpy(values.copy()).bfloat16().float().numpy()
        got = (narrow(values.copy(), "BF16").astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_array_equal(got, expected)


def test_infinities_and_nans_pass_through() -> None:
    a = np.array([np.inf, np.inf, np.nan, 1.0, -np.inf], np.float16)
    b = np.array([1.0, -np.inf, 1.0, np.nan, 2.0], np.float16)
    got = linear([a, b], ["F16", "F16"], [0.5, 0.5], "F16")
    np.testing.assert_array_equal(got, np.array([np.inf, np.nan, np.nan, np.nan, -np.inf], np.float16))
    assert {int(bits) for bits in got.view(np.uint16)[1:4]} == {0x7E00}  # the same NaN on every machine
    overflow = linear([np.array([6e4], np.float16)] * 2, ["F16"] * 2, [1.0, 1.0], "F16")
    assert np.isposinf(overflow[0])


def test_accumulation_type() -> None:
    assert accumulator(["BF16", "F16"]) is np.float32
    assert accumulator(["F32", "F32"]) is accumulator(["BF16", "F32"]) is accumulator(["F64"]) is np.float64


@pytest.mark.parametrize("into", [np.float32, np.float64])
@pytest.mark.parametrize("fmt", ["BF16", "F16"])
def test_widening_is_exact_for_all_bits_and_leaves_the_input_alone(fmt: str, into: type) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    bits.flags.writeable = False
    with np.errstate(invalid="ignore"):
        wide = widen_into(np.empty(2**16, into), bits.view(DTYPES[fmt]), fmt, Scratch())
        finite = bits[(bits & 0x7C00) != 0x7C00]  # without infinities the code takes another branch
        part = widen_into(np.empty(len(finite), into), finite.view(DTYPES[fmt]), fmt, Scratch())
    torch = pytest.importorskip("torch")
    kind = torch.bfloat16 if fmt == "BF16" else torch.float16
    expected = torch.from_numpy(bits.copy()).view(kind).to(torch.float32).numpy()
    np.testing.assert_array_equal(wide, expected)
    np.testing.assert_array_equal(np.signbit(wide), np.signbit(expected))
    np.testing.assert_array_equal(part, expected[(bits & 0x7C00) != 0x7C00])


def test_fp16_is_rounded_as_numpy_does() -> None:
    """Means of neighbouring fp16 numbers are ties; numpy's own conversion is the reference."""
    with np.errstate(all="ignore"):
        every = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
        ties = every[:-1] / 2 + every[1:] / 2
        for values in (every, ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf), every * 7e-5):
            for kind in (np.float32, np.float64):
                expected = values.astype(kind).astype(np.float16)
                got = narrow(values.astype(kind), "F16")
                np.testing.assert_array_equal(got, expected)
                np.testing.assert_array_equal(np.signbit(got[got == 0]), np.signbit(expected[got == 0]))
