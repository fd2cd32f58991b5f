"""Whole merges against the formulas of docs/merge.md in plain Python: one number at a time, bit for bit.

The reference uses struct for files and integers for rounding (tests/support/binary_floats.py), so it shares nothing
with numpy or the compiled passes; both are compared with it. Inputs are ordinary numbers and random bits: NaN,
infinities, subnormals, negative zero, rounding ties, and equal magnitudes for TIES.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from pretrain.merge import merge
from pretrain.merge.methods import native
from tests.support.binary_floats import FORMATS, Model, load, store

Numbers = list[float]


# -- the formulas ------------------------------------------------------------------------------------------------


@dataclass
class Terms:
    """Inputs of one tensor: numbers and weights of the models, numbers of the base, and the accumulation type."""

    name: str
    inputs: list[Numbers]
    weights: list[float]
    base: Numbers
    narrow: bool

    def at(self, value: float | Fraction) -> float:
        """`value` rounded to the accumulation type."""
        return FORMATS["F32" if self.narrow else "F64"].rounded(value)

    def deltas(self, number: int) -> Numbers:
        return [self.at(x - b) for x, b in zip(self.inputs[number], self.base, strict=True)]

    def over(self, above: float, below: float) -> float:
        """Exact quotient, rounded once."""
        if not math.isfinite(above):
            return above / below
        return self.at(Fraction(above) / Fraction(below)) if self.narrow and above else above / below


def linear(terms: Terms, factors: Sequence[float] | None = None) -> Numbers:
    factors = [terms.at(factor) for factor in factors or terms.weights]
    found = []
    for numbers in zip(*terms.inputs, strict=True):
        products = [terms.at(x * factor) for x, factor in zip(numbers, factors, strict=True)]
        found.append(summed(terms, products))
    return found


def summed(terms: Terms, products: Sequence[float]) -> float:
    total = products[0]
    for product in products[1:]:
        total = terms.at(total + product)
    return total


def slerp(terms: Terms, t: float) -> Numbers:
    a, b = terms.inputs
    every = [*a, *b]
    if not all(map(math.isfinite, every)):
        return linear(terms, [1 - t, t])

    def dot(one: Numbers, two: Numbers) -> float:
        return float(sum((Fraction(x) * Fraction(y) for x, y in zip(one, two, strict=True)), Fraction(0)))

    norms = [norm if (norm := math.sqrt(dot(x, x))) > 1e-8 else 1.0 for x in (a, b)]
    cosine = dot(a, b) / norms[0] / norms[1]
    if abs(cosine) > 0.9995:
        return linear(terms, [1 - t, t])
    angle = math.acos(cosine)
    return linear(terms, [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)])


def based(terms: Terms, deltas: list[Numbers], factors: Sequence[float]) -> Numbers:
    factors = [terms.at(factor) for factor in factors]
    found = []
    for base, *numbers in zip(terms.base, *deltas, strict=True):
        products = [terms.at(d * factor) for d, factor in zip(numbers, factors, strict=True)]
        found.append(terms.at(base + summed(terms, products)))
    return found


def trimmed(terms: Terms, deltas: Numbers, density: float) -> Numbers:
    """Keeps the int(density n) largest magnitudes as fp32, at least one; NaN is largest; among equals the first."""
    wanted = max(1, int(density * len(deltas)))

    def magnitude(value: float) -> tuple[bool, float]:
        return (True, 0.0) if math.isnan(value) else (False, abs(FORMATS["F32"].rounded(value)))

    order = sorted(range(len(deltas)), key=lambda i: (magnitude(deltas[i]), -i), reverse=True)
    kept = set(order[:wanted])
    return [d if i in kept else 0.0 for i, d in enumerate(deltas)]


def elected(
    terms: Terms, deltas: list[Numbers], factors: Sequence[float], scale: float, normalize: bool
) -> Numbers:
    factors, weights = [terms.at(f) for f in factors], [terms.at(w) for w in terms.weights]
    scale, found = terms.at(scale), []
    for base, *numbers in zip(terms.base, *deltas, strict=True):
        weighted = [terms.at(d * factor) for d, factor in zip(numbers, factors, strict=True)]
        sign = 1.0 if summed(terms, weighted) >= 0 else -1.0
        total = share = 0.0
        for value, weight in zip(weighted, weights, strict=True):
            agreeing = value * sign
            if math.isnan(agreeing):
                total = math.nan
            elif agreeing > 0:
                total, share = terms.at(total + agreeing), terms.at(share + weight)
        if normalize and share != 0:
            total = terms.over(total, share)
        found.append(terms.at(base + terms.at(total * sign * scale)))
    return found


def dropped(terms: Terms, deltas: Numbers, number: int, density: float, seed: int) -> Numbers:
    """DARE: element n is kept where h(n) < density * 2^32."""
    return [
        d if hashed(f"{seed}/{number}/{terms.name}", n) < round(density * 2**32) else 0.0
        for n, d in enumerate(deltas)
    ]


def hashed(key: str, n: int) -> int:
    """lowbias32 with an xxh64 key per 65,536 elements."""
    word = xxhash.xxh64(key.encode(), seed=n // 65536).intdigest()
    x = (n % 65536) ^ (word & 0xFFFFFFFF)
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    x = x + (word >> 32) & 0xFFFFFFFF
    return x ^ x >> 16


# -- cases -------------------------------------------------------------------------------------------------------


def odd(rng: random.Random, dtype: str) -> int:
    """Random bits of one element: ordinary, a value that repeats, or an edge case of the format."""
    form = FORMATS[dtype]
    fraction = form.precision - 1
    kind = rng.randrange(12)
    if kind < 4:
        return form.encode(form.rounded(rng.gauss(0, 1)))
    if kind < 6:
        return form.encode(form.rounded(rng.choice((-1.5, -1.0, -0.5, 0.5, 1.0, 1.5))))
    sign = rng.getrandbits(1) << (form.size * 8 - 1)
    if kind == 6:
        return sign
    if kind == 7:  # a subnormal, most often a small one
        return sign | rng.getrandbits(rng.randint(1, fraction))
    if kind == 8:  # large
        return sign | (2 * form.bias - rng.randrange(2)) << fraction | rng.getrandbits(fraction)
    if kind == 9:  # an infinity
        return sign | (2 * form.bias + 1) << fraction
    if kind == 10:  # a NaN with a payload
        return sign | (2 * form.bias + 1) << fraction | rng.randint(1, (1 << fraction) - 1)
    return rng.getrandbits(form.size * 8)


def whole(rng: random.Random, dtype: str) -> int:
    """A small multiple of 1/8, so that sums of squares are exact in any order."""
    return FORMATS[dtype].encode(rng.randint(-12, 12) / 8)


def models(
    rng: random.Random, dtypes: Sequence[str], element: Callable[[random.Random, str], int]
) -> list[Model]:
    lengths = {f"layers.{i}.w": rng.choice((1, 2, 3, 7, 8, 9, 17, 40)) for i in range(5)}
    if rng.random() < 0.2:
        lengths["long.w"] = rng.choice((511, 513, 1031))  # longer than one tile of the compiled passes
    return [
        {name: [element(rng, dtype) for _ in range(n)] for name, n in lengths.items()} for dtype in dtypes
    ]


def check(
    tmp_path: Path,
    rng: random.Random,
    element: Callable[[random.Random, str], int],
    weights: Sequence[float],
    expected: Callable[[Terms], Numbers],
    with_base: bool = False,
    outs: Sequence[str] = tuple(FORMATS),
    **asked: Any,
) -> None:
    """Merges models of random dtypes into a random dtype; every tensor must have the bits of `expected`."""
    dtypes = [rng.choice(list(FORMATS)) for _ in range(len(weights) + with_base)]
    if rng.random() < 0.5:
        dtypes = [dtypes[0]] * len(dtypes)
    out = rng.choice([dtype for dtype in (dtypes[0], *FORMATS) if dtype in outs])
    made = models(rng, dtypes, element)
    folders = [
        store(tmp_path / f"in{i}", d, model) for i, (d, model) in enumerate(zip(dtypes, made, strict=True))
    ]
    if with_base:
        asked["base"] = folders[-1]
    merge(folders[: len(weights)], tmp_path / "out", weights=list(weights), dtype=out, **asked)
    got = load(tmp_path / "out", out)
    assert set(got) == set(made[0])
    narrow = all(FORMATS[dtype].size == 2 for dtype in dtypes)
    for name, bits in got.items():
        numbers = [
            [FORMATS[dtype].decode(one) for one in model[name]]
            for dtype, model in zip(dtypes, made, strict=True)
        ]
        base = numbers.pop() if with_base else []
        wanted = expected(Terms(name, numbers, list(weights), base, narrow))
        assert bits == [FORMATS[out].encode(FORMATS[out].rounded(x)) for x in wanted], (name, dtypes, out)


SEEDS = range(16)
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # it would appear in the user's terminal


@pytest.fixture(params=["compiled", "numpy"], autouse=True)
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs every test with the compiled passes (if they were built) and with numpy's."""
    if request.param == "numpy":
        monkeypatch.setattr(native, "compiled_function", lambda *_: None)
    elif native.compiled_function("linear", np.float32) is None:
        pytest.skip("no compiled passes here")


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_reference_s_own_rounding_and_bits(dtype: str) -> None:
    form, rng = FORMATS[dtype], random.Random(1)
    for _ in range(500):
        value = form.decode(bits := odd(rng, dtype))
        assert math.isnan(value) or (form.encode(value), form.rounded(value)) == (bits, value)
    if dtype in ("F32", "F16"):
        letter = {"F32": "<f", "F16": "<e"}[dtype]
        for _ in range(500):
            value = rng.gauss(0, 1) * 2.0 ** rng.randint(-40, 14)
            assert form.rounded(value) == struct.unpack(letter, struct.pack(letter, value))[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_linear(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    weights = [rng.choice((rng.random(), rng.uniform(-2, 2), 1e-30)) for _ in range(rng.randint(2, 4))]
    check(tmp_path, rng, odd, weights, linear, normalize=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_linear_with_weights_that_are_divided_by_their_sum(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    shares = [rng.uniform(0.1, 3) for _ in range(3)]
    total = math.fsum(shares)
    check(tmp_path, rng, odd, shares, lambda terms: linear(terms, [share / total for share in shares]))


@pytest.mark.parametrize("seed", SEEDS)
def test_slerp(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    beta = rng.uniform(0.05, 0.95)
    # for other values the angle depends on the order of fp64 sums, which an fp64 result would show
    element, outs = (
        (whole, tuple(FORMATS)) if rng.random() < 0.7 else (of_ordinary_size, ("F32", "F16", "BF16"))
    )
    check(
        tmp_path,
        rng,
        element,
        (beta, 1 - beta),
        lambda terms: slerp(terms, 1 - beta),
        outs=outs,
        method="slerp",
    )


def of_ordinary_size(rng: random.Random, dtype: str) -> int:
    """Includes infinities and NaN, excludes finite numbers whose squares fp64 cannot represent."""
    while True:
        bits = odd(rng, dtype)
        value = abs(FORMATS[dtype].decode(bits))
        if not 0 < value < 1e-100 and not 1e100 < value < math.inf:
            return bits


@pytest.mark.parametrize("scale", [-1.0, 1.0, 2.0])
def test_slerp_of_tensors_that_are_parallel_opposite_or_zero_is_linear(tmp_path: Path, scale: float) -> None:
    rows = {"w": [1.0, -2.0, 0.5, 3.0], "zero": [0.0, 0.0, 0.0]}
    for name, factor in (("a", 1.0), ("b", scale)):
        model = {k: [FORMATS["F32"].encode(x * factor) for x in row] for k, row in rows.items()}
        store(tmp_path / name, "F32", model)
    merge([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out", beta=0.3, method="slerp")
    got = load(tmp_path / "out", "F32")
    expected = [FORMATS["F32"].rounded(x * 0.3 + x * scale * 0.7) for x in rows["w"]]
    assert [FORMATS["F32"].decode(bits) for bits in got["w"]] == expected


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_task_arithmetic(tmp_path: Path, seed: int, normalize: bool) -> None:
    rng = random.Random(seed)
    weights, scale = [rng.uniform(0.1, 2) for _ in range(rng.randint(1, 3))], rng.choice((1.0, 0.3, -1.7))
    total = math.fsum(weights) if normalize else 1.0

    def expected(terms: Terms) -> Numbers:
        deltas = [terms.deltas(i) for i in range(len(weights))]
        return based(terms, deltas, [scale * (w / total) for w in weights])

    asked: dict[str, Any] = {"method": "task_arithmetic", "scale": scale, "normalize": normalize}
    check(tmp_path, rng, odd, weights, expected, True, **asked)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_ties(tmp_path: Path, seed: int, normalize: bool) -> None:
    rng = random.Random(seed)
    count, scale = rng.randint(1, 3), rng.choice((1.0, 0.3))
    weights = [rng.choice((1.0, rng.uniform(-1, 2))) for _ in range(count)]
    densities = [rng.choice((0.2, 0.5, 0.9, 1.0, rng.uniform(0.01, 1))) for _ in range(count)]

    def expected(terms: Terms) -> Numbers:
        deltas = [trimmed(terms, terms.deltas(i), densities[i]) for i in range(count)]
        return elected(terms, deltas, weights, scale, normalize)

    asked: dict[str, Any] = {"method": "ties", "scale": scale, "density": densities, "normalize": normalize}
    check(tmp_path, rng, odd, weights, expected, True, **asked)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("seed", SEEDS)
def test_dare(tmp_path: Path, seed: int, method: str) -> None:
    rng = random.Random(seed)
    count, scale, key = rng.randint(1, 3), rng.choice((1.0, 0.3)), rng.randrange(1000)
    weights = [rng.choice((1.0, rng.uniform(0.1, 2))) for _ in range(count)]
    densities = [rng.choice((0.2, 0.5, 1.0, rng.uniform(0.01, 1))) for _ in range(count)]
    rescaled = [w / d for w, d in zip(weights, densities, strict=True)]

    def expected(terms: Terms) -> Numbers:
        deltas = [terms.deltas(i) for i in range(count)]
        deltas = [
            d if densities[i] == 1 else dropped(terms, d, i, densities[i], key) for i, d in enumerate(deltas)
        ]
        if method == "dare_linear":
            return based(terms, deltas, [scale * factor for factor in rescaled])
        return elected(terms, deltas, rescaled, scale, False)

    asked: dict[str, Any] = {"method": method, "scale": scale, "density": densities, "seed": key}
    check(tmp_path, rng, odd, weights, expected, True, **asked)


def test_dare_beyond_the_elements_that_share_a_key(tmp_path: Path) -> None:
    count, form = 65536 + 300, FORMATS["BF16"]
    store(tmp_path / "base", "BF16", {"w": [0] * count})
    store(tmp_path / "a", "BF16", {"w": [form.encode(1.0)] * count})
    merge(
        [str(tmp_path / "a")], tmp_path / "out", method="dare_linear", base=str(tmp_path / "base"),
        density=0.25, seed=3,
    )  # fmt: skip
    got = [form.decode(bits) for bits in load(tmp_path / "out", "BF16")["w"]]
    assert got == [4.0 if hashed("3/0/w", n) < 2**30 else 0.0 for n in range(count)]
