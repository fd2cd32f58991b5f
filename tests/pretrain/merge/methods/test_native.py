"""Compiled passes give the same bits as numpy's, for all methods, values, dtypes, block sizes and thread counts."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from pretrain.merge import merge
from pretrain.merge.merge_plan import Term
from pretrain.merge.methods import blocks, native, sparsify, task_vectors
from pretrain.weights import dtypes as kernels
from pretrain.weights.dtypes import DTYPES
from tests.support.merge_inputs import write_bf16
from tests.support.merge_jobs import Held, run

WORDS = {"F64": np.uint64, "F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
BASED = ("task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties")
SPANNED = ("multislerp", "karcher", "model_stock")
EDGES = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-45,
    -1e-40,
    6e-8,
    6e-5,
    65504.0,
    65520.0,
    3.38e38,
    3.4e38,
    1e300,
    math.inf,
    -math.inf,
)


@pytest.fixture(autouse=True)
def compiled() -> None:
    if native.compiled_function("products") is None:
        assert not os.environ.get("CI"), "CI has a compiler, so the passes must have been built"
        built = list(Path(native.__file__).parent.glob("_passes*.so"))
        assert not built, "the passes were built, but are not used"
        pytest.skip("the passes were not built: no compiler")


def both(work: Callable[[], Any]) -> tuple[Any, Any]:
    """Results of `work` with the compiled passes, and with numpy's."""
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        real = native.compiled_function

        def counted(*arguments: Any) -> Any:
            calls.append(arguments)
            return real(*arguments)

        patch.setattr(native, "compiled_function", counted)
        one = work()
        assert calls, "no compiled pass was looked up"
        patch.setattr(native, "compiled_function", lambda *_: None)
        return one, work()


def bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize(
    "weights", [[0.4, 0.6], [1.7, -0.7], [0.2, 0.3, 0.5], [1e-30, 1.0], [3e38, -2e38, 1.0]]
)
def test_every_pattern_merges_to_the_same_bytes(tmp_path: Path, weights: list[float]) -> None:
    """All 65,536 bf16 patterns (with NaN, infinities, subnormals), merged with a permutation of the same patterns."""
    random = np.random.default_rng(0)
    every = np.arange(1 << 16, dtype=np.uint16)
    inputs = []
    for number in range(len(weights)):
        order = random.permutation(every)
        inputs.append(str(write_bf16(tmp_path / f"in{number}", {"w": bf16(order), "odd": bf16(order[:777])})))
    names = iter(("fused", "numpy"))
    records = both(lambda: merge(inputs, tmp_path / next(names), weights=weights))
    assert records[0] == records[1]
    one, other = (tmp_path / name / "model.safetensors" for name in ("fused", "numpy"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("stored", ["F16", "BF16"])
@pytest.mark.parametrize("out", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("beside", ["same", "F32", "F64"])
def test_all_conversions_of_every_16_bit_pattern(stored: str, out: str, beside: str) -> None:
    """Widened to fp32 and fp64; alone, and added to numbers that cause ties and overflows."""
    every = np.arange(1 << 16, dtype=np.uint16).view(DTYPES[stored])
    beside = stored if beside == "same" else beside
    with np.errstate(all="ignore"):
        wide = kernels.widen_into(np.empty(1 << 16, np.float64), every, stored, kernels.Scratch())
        other = kernels.narrow(np.roll(wide, 1), beside)
    for weights in ([1.0, 0.0], [0.5, 0.5], [1.0, 2.0**-11], [1.0, 2.0**-24], [2.0, 0.0]):
        one, two = both(lambda w=weights: run("linear", [every, other], [stored, beside], w, out))  # type: ignore[misc]
        assert one.tobytes() == two.tobytes()


def stored_numbers(draw: st.DrawFn, dtype: str, count: int, seed: int, near: np.ndarray | None) -> np.ndarray:
    """Random bits, edge cases, or neighbours of the numbers `near`."""
    random = np.random.default_rng(seed)
    kind = draw(st.sampled_from(["bits", "edges", "normal", "few"]))
    if kind == "bits":
        words = random.integers(0, 2**64, count, np.uint64)
        return words.astype(WORDS[dtype]).view(DTYPES[dtype])
    if kind == "edges":
        values = random.choice(EDGES, count)
    elif kind == "few":
        values = random.integers(-2, 3, count) * 0.25
    else:
        values = random.standard_normal(count) * 0.02
    if near is not None and kind != "edges":
        values = near + values * 0.125
    return kernels.narrow(values.astype(np.float64), dtype)


@st.composite
def merges(draw: st.DrawFn) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `tests.support.merge_jobs.run`: any method, tensors of any dtypes."""
    method = draw(st.sampled_from(["linear", "slerp", "nuslerp", *BASED, *SPANNED]))
    count = draw(st.sampled_from([1, 3, 7, 8, 63, 129, 1000, 2500]))
    number = 2 if "slerp" in method else draw(st.integers(1 if method not in SPANNED else 2, 4))
    floats = st.sampled_from(["F64", "F32", "F16", "BF16"])
    dtypes = draw(st.one_of(floats.map(lambda d: [d] * 5), st.lists(floats, min_size=5, max_size=5)))
    seed = draw(st.integers(0, 2**32))
    near = np.random.default_rng(seed).standard_normal(count) * 0.02 if draw(st.booleans()) else None
    arrays = [stored_numbers(draw, dtypes[i], count, seed + i, near) for i in range(number)]
    weights = draw(st.lists(st.sampled_from([0.3, 0.7, 1.0, -0.4, 2.5]), min_size=number, max_size=number))
    options: dict[str, Any] = {"block": draw(st.sampled_from([5, 512, 700, 1 << 16])), "threads": 2}
    if method in ("slerp", "nuslerp"):
        options["t"] = draw(st.floats(0, 1))
    if (
        method in BASED
        or method == "model_stock"
        or (method in ("nuslerp", "multislerp") and draw(st.booleans()))
    ):
        options["base"] = stored_numbers(draw, dtypes[4], count, seed + 9, near), dtypes[4]
        options["scale"] = draw(st.sampled_from([1.0, 0.7, -1.5]))
        options["normalize"] = draw(st.booleans())
    if method in BASED[1:]:
        options["rescale"] = draw(st.sampled_from([True, False, "l1"] if "dare" in method else [False, "l1"]))
        options["gamma"] = draw(st.sampled_from([0.0, 0.01, 0.3, 0.9]))
        options["densities"] = draw(st.lists(st.floats(0.01, 1), min_size=number, max_size=number))
        options["seed"] = seed
    return (method, arrays, dtypes[:number], weights, draw(floats)), options


@given(asked=merges())
@settings(max_examples=200, deadline=None)
def test_any_merge_has_numpys_bits(asked: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    given, options = asked

    def bits() -> bytes | str:
        try:
            return run(*given, **options).tobytes()
        except UserError as error:  # directions that cancel each other
            return str(error)

    one, other = both(bits)
    assert one == other


@pytest.mark.parametrize("count", [65536 * 2 + 77, 65536 * 3])
def test_keys_of_dare_and_sums_of_slerp_over_many_blocks(count: int) -> None:
    """Tiles, groups that share a DARE key, and blocks of sums end at different elements."""
    arrays = [np.random.default_rng(i).standard_normal(count).astype(np.float32) for i in range(3)]
    for method, options in (
        ("dare_ties", {"base": (arrays[2], "F32"), "densities": [0.3, 0.6], "seed": 7}),
        ("slerp", {"t": 0.3}),
    ):
        found = set()
        for block, threads in ((1000, 2), (65536, 1), (100_001, 2)):
            given = method, arrays[:2], ["F32"] * 2, [0.4, 0.6], "BF16"
            pair = both(lambda g=given, b=block, t=threads, o=options: run(*g, block=b, threads=t, **o))  # type: ignore[misc]
            found |= {one.tobytes() for one in pair}
        assert len(found) == 1


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "multislerp", "karcher"])
def test_infinities_of_both_signs_in_several_blocks(method: str) -> None:
    """Block sums that are infinite with both signs raise no error."""
    a = np.ones(200_000, np.float32)
    b = a.copy()
    a[5], a[70_000], b[3] = np.inf, -np.inf, 3e38
    one, other = both(lambda: run(method, [a, b], ["F32"] * 2, [0.5, 0.5], "F32", t=0.5))
    assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize(
    "length", [1, 2, 7, 8, 9, 15, 127, 128, 129, 136, 255, 257, 1000, 4099, 65535, 65536]
)
@pytest.mark.parametrize("number", [1, 2, 5, native.MAX_VECTORS])
@pytest.mark.parametrize("based", [False, True])
def test_products_are_added_as_numpy_adds(length: int, number: int, based: bool) -> None:
    random = np.random.default_rng(length)
    x = random.standard_normal((number + 1, length)) * 10.0 ** random.integers(-9, 9, (number + 1, length))
    terms = [Term(i, "w") for i in range(number)]
    block = blocks.Block([Held(row, "F64") for row in x]).move(0, length)  # type: ignore[misc]
    found = native.products(terms, Term(number, "w") if based else None, 0, length, block)
    if based:
        x = x - x[number]
    expected = [[float(np.add.reduce(x[i] * x[j])) for j in range(i + 1)] for i in range(number)]
    assert found == expected


TRIM = {"histogram", "place"}
PASSES: dict[str, set[str]] = {
    "linear": {"linear"}, "slerp": {"products", "linear"}, "nuslerp": {"products", "linear"},
    "multislerp": {"products", "linear"}, "karcher": {"products", "linear"}, "model_stock": {"products", "arithmetic"},
    "task_arithmetic": {"arithmetic"}, "ties": {*TRIM, "consensus"}, "dare_linear": {"norms", "arithmetic"},
    "dare_ties": {"norms", "consensus"}, "breadcrumbs": {*TRIM, "norms", "arithmetic"},
    "breadcrumbs_ties": {*TRIM, "norms", "consensus"},
}  # fmt: skip


@pytest.mark.parametrize("stored", ["F32", "BF16"])
@pytest.mark.parametrize("method", PASSES)
def test_each_method_runs_its_compiled_passes(
    method: str, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that can be compiled is: a function that is not found would only cost time."""
    found: set[tuple[str, Any]] = set()
    real = native.compiled_function

    def recorded(name: str, kind: Any = None) -> Callable[..., Any]:
        function = real(name, kind)
        assert function is not None, (name, kind)
        return lambda *arguments: found.add((name, kind)) or function(*arguments)

    monkeypatch.setattr(native, "compiled_function", recorded)
    arrays = [kernels.narrow(np.random.default_rng(i).standard_normal(700), stored) for i in range(3)]
    more: dict[str, Any] = {"base": (arrays[2], stored)} if method in (*BASED, "model_stock") else {}
    more |= {"densities": [0.4, 0.6], "rescale": "l1" if "norms" in PASSES[method] else False}
    run(method, arrays[:2], [stored] * 2, [0.4, 0.6], stored, **more)
    wide = np.float64 if stored == "F32" else np.float32
    assert found == {(name, None if name == "products" else wide) for name in PASSES[method]}


@pytest.mark.parametrize("number", [native.MAX_VECTORS, native.MAX_VECTORS + 1])
def test_more_models_than_the_compiled_products_take(number: int) -> None:
    models = [np.random.default_rng(i).standard_normal(300) for i in range(number)]
    weights = [0.1 + 0.01 * i for i in range(number)]
    one, other = both(
        lambda: run("multislerp", models, ["F64"] * number, weights, "F64", base=(models[3] * 0.5, "F64"))
    )
    assert one.tobytes() == other.tobytes()
    offsets = np.stack(models) - models[3] * 0.5
    norms = np.linalg.norm(offsets, axis=1)
    mean = weights @ (offsets / norms[:, None])
    expected = models[3] * 0.5 + mean / np.linalg.norm(mean) * (weights @ norms)
    np.testing.assert_allclose(one, expected, rtol=1e-7)


def test_choices_of_dare_are_pinned() -> None:
    """The entries that a seed drops must never change."""
    block = blocks.Block([]).move(65_530, 65_546)
    key = task_vectors.dare_key(3, "model.layers.0.mlp.up_proj.weight", 1)
    assert np.packbits(task_vectors.dare_mask(key, 0.3, block)).tolist() == [58, 10]
    ones, zero = np.ones(65_546, np.float32), np.zeros(65_546, np.float32)

    def kept() -> list[int]:
        got = run(
            "dare_linear", [zero, ones], ["F32"] * 2, [1.0, 1.0], "F32", densities=[1.0, 0.3], base=(zero, "F32"),
            seed=3, rescale=False, name="model.layers.0.mlp.up_proj.weight",
        )  # fmt: skip
        return np.packbits(got[65_530:] != 0).tolist()

    assert both(kept) == ([58, 10], [58, 10])


@pytest.mark.parametrize(
    ("per_span", "in_all"), [(0, 1 << 22), (3, 1 << 22), (1 << 14, 1 << 22), (1 << 14, 9)]
)
def test_thresholds_are_numpys_in_any_span(
    monkeypatch: pytest.MonkeyPatch, per_span: int, in_all: int
) -> None:
    """The same threshold whether a span's histogram is kept, or counted again because there are many bins or spans."""
    monkeypatch.setattr(kernels, "ELEMENTS_PER_SPAN", 256)
    monkeypatch.setattr(blocks, "ELEMENTS_PER_SPAN", 256)
    monkeypatch.setattr(sparsify, "MAX_BINS_PER_SPAN", per_span)
    monkeypatch.setattr(sparsify, "MAX_BINS", in_all)
    random = np.random.default_rng(per_span)
    values = (random.integers(-40, 40, 3000) * 2.0**-12).astype(np.float32) + np.float32(1)
    base = np.ones(3000, np.float32)
    for density in (0.001, 0.1, 0.3333, 0.777, 0.9999):
        given: dict[str, Any] = {
            "base": (base, "F32"),
            "densities": [density],
            "block": 100,
            "normalize": False,
        }
        one, other = both(lambda g=given: run("ties", [values], ["F32"], [1.0], "F32", **g))  # type: ignore[misc]
        assert one.tobytes() == other.tobytes()
        kept = np.argsort(-np.abs(values - base), kind="stable")[: max(1, int(density * 3000))]
        expected = base.copy()
        expected[kept] = values[kept]
        np.testing.assert_array_equal(one, expected)


def test_tensors_that_begin_at_odd_bytes_or_have_gaps() -> None:
    raw = np.random.default_rng(0).standard_normal(1001).astype(np.float32).tobytes()
    odd = np.frombuffer(b"x" + raw, np.float32, 1001, 1)
    assert odd.ctypes.data % 4
    even = odd.copy()
    gaps = np.repeat(even, 3)[::3]
    assert not gaps.flags.contiguous
    for method in ("linear", "slerp", "ties", "dare_ties"):
        reverse = even[::-1].copy()
        bits = set()
        for first, base in ((even, reverse), (odd, reverse), (gaps, np.repeat(reverse, 2)[::2])):
            more: dict[str, Any] = (
                {"base": (base, "F32"), "densities": [0.4, 0.6]} if "ties" in method else {}
            )
            more |= {"rescale": "l1"} if method == "dare_ties" else {}
            bits.add(run(method, [first, even], ["F32"] * 2, [0.3, 0.7], "BF16", block=100, **more).tobytes())
        assert len(bits) == 1
