"""SLERP, task arithmetic, TIES and DARE against naive implementations of their definitions, for any block size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.merge.methods import blocks, native, task_vectors
from pretrain.weights import dtypes
from tests.support.merge_inputs import bf16_bits, floats
from tests.support.merge_jobs import run

N = 5000
BASED = ["task_arithmetic", "ties", "dare_linear", "dare_ties"]


@pytest.fixture
def three() -> list[np.ndarray]:
    """A base and two models close to it."""
    base = floats(0, N)
    return [base, *(base + floats(i, N, scale=0.1) for i in (1, 2))]


def test_slerp_is_the_arc_between_both() -> None:
    a, b = floats(1, N), floats(2, N, scale=3.0)
    got = run("slerp", [a, b], ["F32"] * 2, [0.7, 0.3], "F32", t=0.3).astype(np.float64)
    x, y = a.astype(np.float64), b.astype(np.float64)
    angle = math.acos(float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)))
    expected = (math.sin(0.7 * angle) * x + math.sin(0.3 * angle) * y) / math.sin(angle)
    np.testing.assert_allclose(got, expected, rtol=2**-23)
    assert not np.allclose(got, 0.7 * x + 0.3 * y, rtol=1e-2)


@pytest.mark.parametrize("other", [1.0, -1.0])
def test_slerp_of_almost_one_direction_is_linear(other: float) -> None:
    a = floats(1, N)
    b = (other * a + floats(2, N, scale=0.001)).astype(np.float32)
    got = run("slerp", [a, b], ["F32"] * 2, [0.75, 0.25], "F32", t=0.25)
    np.testing.assert_array_equal(got, run("linear", [a, b], ["F32"] * 2, [0.75, 0.25], "F32"))


def test_slerp_treats_zeros_as_orthogonal() -> None:
    """As in mergekit: zeros count as orthogonal, and the other tensor is scaled by the sine of its share."""
    a, zero = floats(1, 64), np.zeros(64, np.float32)
    got = run("slerp", [a, zero], ["F32"] * 2, [0.5, 0.5], "F32", t=0.5)
    np.testing.assert_allclose(got, a * math.sin(math.pi / 4), rtol=2**-23)


def test_task_arithmetic_adds_differences(three: list[np.ndarray]) -> None:
    base, a, b = (x.astype(np.float64) for x in three)
    got = run(
        "task_arithmetic", three[1:], ["F32"] * 2, [0.5, -0.25], "F32", base=(three[0], "F32"), scale=0.8
    )
    expected = base + ((0.8 * 0.5) * (a - base) + (0.8 * -0.25) * (b - base))
    np.testing.assert_array_equal(got, expected.astype(np.float32))
    got = run(
        "task_arithmetic", three[1:], ["F32"] * 2, [3.0, 1.0], "F32", base=(three[0], "F32"), normalize=True
    )
    np.testing.assert_array_equal(got, (base + (0.75 * (a - base) + 0.25 * (b - base))).astype(np.float32))


@pytest.mark.parametrize("weights", [[1.0, -1.0], [1.0, -1.0 + 5e-9], [1.0, -1.0 + 2e-8], [0.25, 0.5]])
def test_weights_that_cancel_are_not_divided_by_their_sum(
    three: list[np.ndarray], weights: list[float]
) -> None:
    base, a, b = (x.astype(np.float64) for x in three)
    total = sum(weights) if sum(weights) > 1e-8 else 1.0
    got = run("task_arithmetic", [a, b], ["F64"] * 2, weights, "F64", base=(base, "F64"), normalize=True)
    expected = base + ((weights[0] / total) * (a - base) + (weights[1] / total) * (b - base))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("passes", ["compiled", "numpy"])
@pytest.mark.parametrize("scale", [1e-11, 1.3e-12, 5e-13])  # norms above 1e-7; of all; none
@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties"])
def test_rescaled_by_l1_what_is_kept_has_the_norm_of_all(
    method: str, scale: float, passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms below 1e-7 are left alone, as is a model of density 1. Two blocks of sums and a rest."""
    if passes == "numpy":
        monkeypatch.setattr(native, "compiled_function", lambda *_: None)
    count = 2 * 65_536 + 77
    zero = np.zeros(count), "F64"
    models = [floats(seed, count).astype(np.float64) * scale for seed in (1, 2)]
    for density in (0.3, 1.0):
        kept, full = [], []
        for number, weight in ((0, 0.5), (1, 0.25)):  # masks of DARE depend on the number of the model
            weights = [weight if k == number else 0.0 for k in (0, 1)]
            given = method, models, ["F64"] * 2, weights, "F64"
            more: dict[str, Any] = {
                "base": zero,
                "densities": [density] * 2,
                "normalize": False,
                "gamma": 0.1,
            }
            kept.append(run(*given, **more, rescale=False))
            full.append(run(*given, **more, rescale="l1"))
            norms = [np.abs(x).sum() for x in (models[number] * weight, kept[number])]
            ratio = norms[0] / norms[1] if density < 1 and scale > 2e-12 else 1.0
            np.testing.assert_allclose(full[number], kept[number] * ratio, rtol=1e-12)
            assert (ratio > 1.1) == (density < 1 and scale > 2e-12)


def test_what_keeps_nothing_is_not_rescaled() -> None:
    more: dict[str, Any] = {"base": (floats(2, 50), "F32"), "densities": [1e-6], "rescale": "l1"}
    got = run("breadcrumbs", [floats(1, 50)], ["F32"], [1.0], "F32", **more)
    np.testing.assert_array_equal(got, floats(2, 50))


def naive_trim(difference: np.ndarray, density: float) -> np.ndarray:
    """By sorting: largest float32 magnitude first, among equals the first; keeps at least one entry."""
    kept = max(1, int(density * len(difference)))
    order = np.lexsort((np.arange(len(difference)), -np.abs(difference.astype(np.float32))))
    out = np.zeros_like(difference)
    out[order[:kept]] = difference[order[:kept]]
    return out


def naive_ties(
    base: np.ndarray, differences: list[np.ndarray], weights: list[float], scale: float, normalize: bool
) -> np.ndarray:
    """Entry by entry, in the accumulation type, so that every operation is rounded to it."""
    kind = base.dtype.type
    factors = [kind(weight) for weight in weights]
    out = np.empty_like(base)
    for i in range(len(base)):
        weighted = [kind(d[i] * f) for d, f in zip(differences, factors, strict=True)]
        elected = kind(0)
        for one in weighted:
            elected = kind(elected + one)
        agree = [one > 0 if elected >= 0 else one < 0 for one in weighted]
        total, share = kind(0), kind(0)
        for one, factor, agrees in zip(weighted, factors, agree, strict=True):
            if agrees:
                total, share = kind(total + one), kind(share + factor)
        if normalize and share != 0:
            total = kind(total / share)
        out[i] = kind(base[i] + kind(kind(scale) * total))
    return out


@pytest.mark.parametrize("stored", ["F32", "BF16"])
@pytest.mark.parametrize("normalize", [True, False])
def test_ties_is_its_definition(three: list[np.ndarray], stored: str, normalize: bool) -> None:
    """bf16 differences have many equal magnitudes; the first ones are kept."""
    if stored == "BF16":
        bits = [bf16_bits(x) for x in three]
        wide = [(b.astype(np.uint32) << 16).view(np.float32) for b in bits]
        given, out = bits, "F32"
    else:
        given, wide, out = three, [x.astype(np.float64) for x in three], "F32"
    densities, weights = [0.37, 0.5], [0.6, 0.9]
    differences = [naive_trim(x - wide[0], d) for x, d in zip(wide[1:], densities, strict=True)]
    expected = naive_ties(wide[0], differences, weights, 0.7, normalize).astype(np.float32)
    got = run(
        "ties", given[1:], [stored] * 2, weights, out, densities=densities, base=(given[0], stored),
        scale=0.7, normalize=normalize,
    )  # fmt: skip
    np.testing.assert_array_equal(got, expected)


def test_ties_of_one_sided_weights_subtracts(three: list[np.ndarray]) -> None:
    wide = [x.astype(np.float64) for x in three]
    expected = naive_ties(wide[0], [x - wide[0] for x in wide[1:]], [-1.0, 0.5], 1.0, True)
    got = run("ties", three[1:], ["F32"] * 2, [-1.0, 0.5], "F32", base=(three[0], "F32"), normalize=True)
    np.testing.assert_array_equal(got, expected.astype(np.float32))


@given(
    values=st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, 2.0, -2.0, 1e-40, -1e-40, math.inf, 3e38]), min_size=1
    ),
    density=st.floats(0, 1),
    block=st.integers(1, 7),
)
@settings(max_examples=300, deadline=None)
def test_trimming_keeps_exactly_the_largest_and_of_equal_ones_the_first(
    values: list[float], density: float, block: int
) -> None:
    array, base = np.array(values, np.float32), np.zeros(len(values), np.float32)
    got = run(
        "ties",
        [array],
        ["F32"],
        [1.0],
        "F32",
        densities=[density],
        base=(base, "F32"),
        normalize=False,
        block=block,
    )
    expected = naive_trim(array.astype(np.float64), density) + base
    np.testing.assert_array_equal(got, expected.astype(np.float32))


def test_the_cut_is_found_in_any_span(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal entries in several spans: entries equal to the threshold are counted span by span."""
    monkeypatch.setattr(dtypes, "ELEMENTS_PER_SPAN", 64)
    monkeypatch.setattr(blocks, "ELEMENTS_PER_SPAN", 64)
    values = np.random.default_rng(0).integers(0, 3, 1000).astype(np.float32)
    zero = np.zeros(1000, np.float32)
    for density in (0.1, 0.3333, 0.5, 0.777, 0.999):
        got = run(
            "ties",
            [values],
            ["F32"],
            [1.0],
            "F32",
            densities=[density],
            base=(zero, "F32"),
            normalize=False,
            block=16,
        )
        np.testing.assert_array_equal(got, naive_trim(values, density))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_drops_at_random_and_rescales(method: str) -> None:
    count, density = 200_000, 0.3
    base, model = np.zeros(count, np.float32), np.ones(count, np.float32)
    got = run(method, [model], ["F32"], [1.0], "F32", densities=[density], base=(base, "F32"), seed=3)
    assert set(np.unique(got)) == {0.0, np.float32(1 / density)}
    kept = np.count_nonzero(got) / count
    assert abs(kept - density) < 5 * math.sqrt(density * (1 - density) / count)
    plain = run(
        method, [model], ["F32"], [1.0], "F32", densities=[density], base=(base, "F32"), seed=3, rescale=False
    )
    np.testing.assert_array_equal(plain, (got > 0).astype(np.float32))


def test_dare_linear_is_its_definition_for_known_kept_entries(three: list[np.ndarray]) -> None:
    ones, zero = np.ones(N, np.float32), (np.zeros(N, np.float32), "F32")
    stays = [
        run(
            "dare_linear",
            [ones] * 2,
            ["F32"] * 2,
            w,
            "F32",
            densities=[0.4, 0.8],
            base=zero,
            seed=1,
            rescale=False,
        )
        for w in ([1.0, 0.0], [0.0, 1.0])
    ]
    base, a, b = (x.astype(np.float64) for x in three)
    expected = base + ((0.5 / 0.4) * (a - base) * stays[0] + (0.7 / 0.8) * (b - base) * stays[1])
    got = run(
        "dare_linear",
        three[1:],
        ["F32"] * 2,
        [0.5, 0.7],
        "F32",
        densities=[0.4, 0.8],
        base=(three[0], "F32"),
        seed=1,
    )
    np.testing.assert_array_equal(got, expected.astype(np.float32))


@pytest.mark.parametrize(
    ("density", "below"),
    [(0.0, 0), (2.0**-32, 1), (0.5, 2**31), (0.3, 1_288_490_189), (1 - 2.0**-40, 2**32 - 1)],
)
def test_density_is_a_number_of_32_bits(density: float, below: int) -> None:
    assert task_vectors.dare_threshold(density) == below


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 0), (0, 1), (5, 65_536), (65_535, 65_537), (131_072, 262_144), (70_000, 70_001)]
)
def test_masks_of_dare_do_not_depend_on_where_a_block_begins(start: int, stop: int) -> None:
    """And the compiled passes get one key for each group of 65,536 elements that the block overlaps."""
    whole = blocks.Block([]).move(0, 262_144)
    key = task_vectors.dare_key(5, "w", 2)
    expected = task_vectors.dare_mask(key, 0.5, whole)[start:stop].copy()
    found = task_vectors.dare_mask(key, 0.5, blocks.Block([]).move(start, stop))
    np.testing.assert_array_equal(found, expected)
    every = [xxhash.xxh64_intdigest(b"5/2/w", group) for group in range(4)]
    groups = sorted({element >> 16 for element in range(start, stop)})
    assert task_vectors.dare_block_keys(key, start, stop).tolist() == [every[group] for group in groups]


def chosen(seed: int, name: str, source: int, count: int = 1 << 17) -> np.ndarray:
    block = blocks.Block([]).move(0, count)
    return task_vectors.dare_mask(task_vectors.dare_key(seed, name, source), 0.5, block).copy()


def test_choices_of_dare_look_like_coins() -> None:
    """Masks of neighbours, tensors, models, seeds and key groups agree no more often than by chance."""
    first = chosen(0, "w", 0)
    count = len(first)
    others = [
        chosen(1, "w", 0),
        chosen(0, "v", 0),
        chosen(0, "w", 1),
        np.roll(first, 1),
        np.roll(first, 1 << 16),
    ]
    others += [np.roll(first, shift) for shift in (2, 64, 1 << 8, 1 << 12)]
    for other in others:
        assert abs(np.count_nonzero(first == other) - count / 2) < 5 * math.sqrt(count) / 2
    words = np.packbits(first)
    expected = len(words) / 256
    chi = float(np.sum((np.bincount(words, minlength=256) - expected) ** 2) / expected)
    assert chi < 255 + 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("method", ["linear", "slerp", *BASED])
@pytest.mark.parametrize("stored", ["F64", "F32", "F16", "BF16"])
def test_bits_depend_neither_on_blocks_nor_on_threads(
    three: list[np.ndarray], method: str, stored: str
) -> None:
    def as_stored(values: np.ndarray) -> np.ndarray:
        return dtypes.narrow(values.astype(np.float64), stored)

    arrays = [as_stored(x) for x in three]
    methods: dict[str, dict[str, Any]] = {"slerp": {"t": 0.4}, "ties": {"normalize": True}}
    options = methods.get(method, {})
    if method in BASED:
        options |= {
            "base": (arrays[0], stored),
            "densities": [0.3, 0.6] if method != "task_arithmetic" else None,
        }
    found = {
        run(
            method, arrays[1:], [stored] * 2, [0.6, 0.4], stored, block=block, threads=threads, **options
        ).tobytes()
        for block, threads in ((1, 3), (7, 1), (1000, 2), (1 << 20, 2))
    }
    assert len(found) == 1


@pytest.mark.parametrize("method", BASED)
def test_nan_and_infinities_stay_at_their_entries(three: list[np.ndarray], method: str) -> None:
    base, a, b = (x.copy() for x in three)
    a[3], b[4], base[5] = np.nan, np.inf, np.nan
    got = run(method, [a, b], ["F32"] * 2, [0.5, 0.5], "F32", base=(base, "F32"))
    assert [i for i in range(N) if not np.isfinite(got[i])] == [3, 4, 5]
