"""Gram-matrix methods, Breadcrumbs and SCE against their definitions in plain numpy on whole vectors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from data_pipeline.errors import UserError
from pretrain.merge.methods import blocks, gram, native
from pretrain.merge.methods import sce as sce_module
from tests.support.merge_inputs import bf16_bits, floats
from tests.support.merge_jobs import run

COUNT = 70_001  # more than a block
VECTORS = [floats(seed, COUNT) + floats(9, COUNT) for seed in range(3)]
BASE = floats(9, COUNT) * np.float32(0.5)


def wide(*arrays: np.ndarray) -> list[np.ndarray]:
    return [array.astype(np.float64) for array in arrays]


def angle(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.arccos(np.clip(a @ b / np.linalg.norm(a) / np.linalg.norm(b), -1, 1)))


def spanned(method: str, weights: list[float], based: bool, count: int = 3, **options: float) -> np.ndarray:
    """The result; asserts that it does not depend on block size and threads."""
    base = (BASE, "F32") if based else None
    given = VECTORS[:count], ["F32"] * count, weights, "F64"
    found = [
        run(method, *given, base=base, block=block, threads=threads, **options)
        for block, threads in ((1 << 16, 2), (1000, 3))
    ]
    assert found[0].tobytes() == found[1].tobytes()
    return found[0]


@pytest.mark.parametrize("based", [True, False])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.5])
def test_nuslerp_turns_by_its_share_of_the_angle(based: bool, t: float) -> None:
    start = BASE.astype(np.float64) if based else np.zeros(COUNT)
    a, b = (vector - start for vector in wide(*VECTORS[:2]))
    got = spanned("nuslerp", [1 - t, t], based, 2, t=t) - start
    whole = angle(a, b)
    s0, s1 = np.sin((1 - t) * whole) / np.sin(whole), np.sin(t * whole) / np.sin(whole)
    np.testing.assert_allclose(got, s0 * a + s1 * b, rtol=1e-12, atol=1e-12)


def test_nuslerp_of_parallel_vectors_is_linear() -> None:
    products = np.array([[4.0, 6.0], [6.0, 9.0]])
    assert gram.nuslerp(products, 0.25) == [0.75, 0.25]
    assert gram.nuslerp(products * [[1, -1], [-1, 1]], 0.25) == [0.75, 0.25]
    assert gram.nuslerp(np.zeros((2, 2)), 0.25) == pytest.approx(
        [np.sin(0.75 * np.pi / 2), np.sin(0.25 * np.pi / 2)]
    )


@pytest.mark.parametrize(("method", "bound"), [("slerp", 1e-8), ("nuslerp", 1e-7), ("model_stock", 1e-3)])
@pytest.mark.parametrize("passes", ["compiled", "numpy"])
def test_norms_below_mergekits_bounds(
    method: str, bound: float, passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equal vectors: smaller norms count as 1 in slerp, as 1e-7 in nuslerp; products as 1e-6 in model_stock."""
    if passes == "numpy":
        monkeypatch.setattr(native, "compiled_function", lambda *_: None)
    for factor in (0.8, 1.25):
        norm = factor * bound
        vectors = [np.array([0.6, 0.8]) * norm] * 2
        base = (np.zeros(2), "F64") if method == "model_stock" else None
        got = run(method, vectors, ["F64"] * 2, [0.75, 0.25], "F64", base=base, t=0.25)
        cosine = norm * norm / {"slerp": 1.0, "nuslerp": 1e-14, "model_stock": 1e-6}[method]
        turn = np.arccos(min(1.0, cosine))
        factors = (np.sin(0.75 * turn) + np.sin(0.25 * turn)) / np.sin(turn) if factor < 1 else 1.0
        if method == "model_stock" and factor < 1:
            factors = 2 * cosine / (1 + cosine)
        np.testing.assert_allclose(got, vectors[0] * factors, rtol=1e-12)


@pytest.mark.parametrize("cosine", [0.9994, 0.99951, -0.9994, -0.99951, 0.5, -0.5, 0.0])
def test_slerp_is_linear_beyond_mergekits_cosine(cosine: float) -> None:
    """0.9995; nuslerp has no such bound."""
    a, b = np.array([1.0, 0.0]), np.array([cosine, np.sqrt(1 - cosine * cosine)])
    turn = np.arccos(cosine)
    given = [a, b * 3], ["F64"] * 2, [0.7, 0.3], "F64"
    slerp, nuslerp = (run(method, *given, t=0.3) for method in ("slerp", "nuslerp"))
    s = np.sin(0.7 * turn) / np.sin(turn), np.sin(0.3 * turn) / np.sin(turn)
    np.testing.assert_allclose(nuslerp, s[0] * a + s[1] * 3 * b, rtol=1e-9)
    np.testing.assert_allclose(slerp, 0.7 * a + 0.9 * b if abs(cosine) > 0.9995 else nuslerp, rtol=1e-9)


# method -> options of a job that leaves one option out, its name, mergekit's default, and another value
LEFT_OUT: list[tuple[str, dict[str, float], str, float, float]] = [
    ("slerp", {}, "t", 0.5, 0.4), ("nuslerp", {}, "t", 0.5, 0.4), ("multislerp", {}, "eps", 1e-8, 2e-8),
    ("karcher", {"tol": 1e-300}, "max_iter", 10, 9), ("karcher", {"max_iter": 100}, "tol", 1e-5, 1e-4),
    ("sce", {}, "select_topk", 1.0, 0.99), ("breadcrumbs", {}, "gamma", 0.01, 0.02),
    ("breadcrumbs_ties", {}, "gamma", 0.01, 0.02), ("task_arithmetic", {}, "lambda", 1.0, 0.9),
    ("ties", {}, "lambda", 1.0, 0.9), ("task_arithmetic", {}, "normalize", False, True),
    ("ties", {}, "normalize", True, False), ("dare_ties", {}, "normalize", False, True),
    ("breadcrumbs_ties", {}, "normalize", False, True), ("dare_linear", {}, "rescale", True, False),
    ("dare_ties", {}, "rescale", True, False), ("ties", {}, "rescale", False, True),
    ("breadcrumbs", {}, "rescale", False, True), ("dare_linear", {}, "seed", 0, 1), ("dare_ties", {}, "seed", 0, 1),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options", "name", "default", "other"), LEFT_OUT)
def test_options_that_are_left_out_have_mergekits_defaults(
    method: str, options: dict[str, float], name: str, default: float, other: float
) -> None:
    random = np.random.default_rng(0)
    vectors = [random.standard_normal(300) * 1e-6 for _ in range(2 if "slerp" in method else 3)]
    if method == "karcher":
        vectors = [vector * 1e6 + 1 for vector in vectors]
    base = (np.zeros(300), "F64") if method not in ("slerp", "nuslerp", "multislerp", "karcher") else None
    count = len(vectors)
    densities = [0.4, 0.5, 0.6][:count]

    def merged(**more: float) -> bytes:
        given = method, vectors, ["F64"] * count, [0.3, 0.5, 0.7][:count], "F64"
        return run(*given, base=base, densities=densities, **options, **more).tobytes()

    assert merged() == merged(**{name: default})
    assert merged() != merged(**{name: other})


@pytest.mark.parametrize(("method", "factor"), [("multislerp", 0.5), ("karcher", 1.0), ("model_stock", 1.0)])
@pytest.mark.parametrize("based", [True, False])
def test_one_model_alone(method: str, factor: float, based: bool) -> None:
    """Inputs of weight 0 are left out. Its length is the weight's size in multislerp, else it is the model itself."""
    base = (np.array([1.0, 1.0]), "F64") if based else None
    got = run(method, [np.array([3.0, -2.0])], ["F64"], [-0.5], "F64", base=base)
    np.testing.assert_array_equal(
        got, 1 + factor * np.array([2, -3]) if based else factor * np.array([3, -2])
    )


@pytest.mark.parametrize("based", [True, False])
def test_multislerp_has_the_mean_direction_and_length(based: bool) -> None:
    weights = [0.2, 0.5, 0.3]
    start = BASE.astype(np.float64) if based else np.zeros(COUNT)
    vectors = [vector - start for vector in wide(*VECTORS)]
    got = spanned("multislerp", weights, based, eps=1e-8) - start
    units = [vector / np.linalg.norm(vector) for vector in vectors]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    assert angle(got, mean) < 1e-6
    length = sum(w * np.linalg.norm(v) for w, v in zip(weights, vectors, strict=True))
    assert np.linalg.norm(got) == pytest.approx(length, rel=1e-9)


def test_multislerp_of_what_cancels() -> None:
    opposite = np.array([[1.0, -1.0], [-1.0, 1.0]])
    half = np.array([0.5, 0.5])
    assert gram.multislerp(opposite, half, 1e-8, "w") is half
    three = np.full((3, 3), -0.5) + 1.5 * np.eye(3)
    with pytest.raises(UserError, match="w: the directions cancel each other"):
        gram.multislerp(three, np.ones(3) / 3, 1e-8, "w")
    # A mean direction of exactly eps is one: 0.75 / (1 + 0.5) = 0.5.
    same = np.ones((3, 3))
    assert gram.multislerp(same, np.array([0.75, 0.0, 0.0]), 0.5, "w").sum() > 0
    with pytest.raises(UserError, match="w: the directions cancel each other"):
        gram.multislerp(same, np.array([0.74, 0.0, 0.0]), 0.5, "w")


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_multislerp_of_what_has_no_direction_is_the_weighted_sum(value: float) -> None:
    """Untrained biases are zeros; NaN and infinities stay at their entries, as with slerp."""
    rows = [np.arange(1, 5, dtype=np.float32) * (value != 0) for _ in range(3)]
    rows[1][2] = value
    weights = [0.5, 0.25, 0.25]
    with np.errstate(invalid="ignore"):
        wanted = sum(w * row for w, row in zip(weights, rows, strict=True))
    np.testing.assert_array_equal(run("multislerp", rows, ["F32"] * 3, weights, "F32"), wanted)


def test_the_karcher_mean_pulls_to_no_side() -> None:
    """By definition, the tangents towards all directions sum to zero."""
    vectors = wide(*VECTORS)
    got = spanned("karcher", [1.0] * 3, False, max_iter=100, tol=1e-12)
    mean = got / np.linalg.norm(got)
    pull = np.zeros(COUNT)
    for vector in vectors:
        unit = vector / np.linalg.norm(vector)
        away = unit - (unit @ mean) * mean
        pull += angle(unit, mean) * away / np.linalg.norm(away)
    assert np.linalg.norm(pull) < 1e-6
    assert np.linalg.norm(got) == pytest.approx(np.mean([np.linalg.norm(v) for v in vectors]), rel=1e-9)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 200])
def test_each_step_of_the_karcher_mean_follows_the_mean_tangent(steps: int) -> None:
    """On the vectors themselves: logarithms at the mean, averaged, and the exponential of the average."""
    vectors = np.random.default_rng(1).standard_normal((4, 6)) * [[1], [2], [3], [4]] + 1
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    mean = units.mean(axis=0) / np.linalg.norm(units.mean(axis=0))
    for _ in range(steps):
        away = units - np.outer(units @ mean, mean)
        logs = away / np.linalg.norm(away, axis=1, keepdims=True) * np.arccos(units @ mean)[:, None]
        tangent = logs.mean(axis=0)
        size = np.linalg.norm(tangent)
        if size > 0:
            mean = np.cos(size) * mean + np.sin(size) * tangent / size
        mean /= np.linalg.norm(mean)  # errors of rounding would double at each of 200 steps
    factors = gram.karcher(vectors @ vectors.T, steps, 1e-300)
    np.testing.assert_allclose(factors @ vectors, mean * np.linalg.norm(vectors, axis=1).mean(), rtol=1e-9)


def test_the_karcher_mean_stops_at_its_tolerance() -> None:
    """A step that is shorter than `tol` is not made, and vectors up to `tol` count for the length alone."""
    vectors = np.array([[1.0, 0, 0], [0, 2, 0], [-2, 0.1, 0.5]])
    products = vectors @ vectors.T
    by_steps = [gram.karcher(products, steps, 1e-300) for steps in range(5)]
    norms = np.linalg.norm(vectors, axis=1)
    means = [factors @ vectors / norms.mean() for factors in by_steps]
    turns = [angle(a, b) for a, b in itertools.pairwise(means)]
    assert all(one > 1.5 * next_one > 1e-5 for one, next_one in itertools.pairwise(turns))
    for steps in (1, 2, 3):
        tol = (turns[steps - 1] * turns[steps]) ** 0.5  # between both steps
        np.testing.assert_allclose(gram.karcher(products, 50, tol), by_steps[steps], rtol=1e-12)
    short = np.vstack([vectors, 0.01 * vectors[0]])
    factors = gram.karcher(short @ short.T, 3, 0.011 * norms[0])
    assert factors[3] == 0
    alone = gram.karcher(products, 3, 0.011 * norms[0])
    length = np.append(norms, 0.01 * norms[0]).mean() / norms.mean()
    np.testing.assert_allclose(factors[:3], alone * length, rtol=1e-12)


def test_the_karcher_mean_of_nothing_much() -> None:
    assert not gram.karcher(np.zeros((3, 3)), 10, 1e-5).any()
    np.testing.assert_allclose(gram.karcher(np.diag([4.0, 0.0]), 10, 1e-5), [0.5, 0.0])
    opposite = np.array([[1.0, -1.0], [-1.0, 1.0]])
    np.testing.assert_allclose(gram.karcher(opposite, 0, 1e-5), [1.0, 0.0])


def test_model_stock_as_its_paper_states_it() -> None:
    """t = N cos / (1 + (N - 1) cos) of arXiv 2403.19522, cos the mean over pairs."""
    base, *vectors = wide(BASE, *VECTORS)
    offsets = [vector - base for vector in vectors]
    cosine = np.mean([np.cos(angle(a, b)) for a, b in itertools.combinations(offsets, 2)])
    t = 3 * cosine / (1 + 2 * cosine)
    wanted = t * np.mean(vectors, axis=0) + (1 - t) * base
    np.testing.assert_allclose(spanned("model_stock", [1.0] * 3, True), wanted, rtol=1e-11, atol=1e-11)


def test_model_stock_keeps_the_base_where_differences_cancel() -> None:
    three = np.full((3, 3), -0.5) + 1.5 * np.eye(3)
    assert gram.model_stock(three) == [0.0] * 3
    assert gram.model_stock(np.zeros((2, 2))) == [0.0, 0.0]
    assert gram.model_stock(np.ones((4, 4))) == [0.25] * 4
    for cosine in (-0.9999, -1 + 3e-6):  # close to 0, but large enough
        pair = np.array([[4.0, 6 * cosine], [6 * cosine, 9.0]])
        assert gram.model_stock(pair) == pytest.approx([cosine / (1 + cosine)] * 2)
    assert gram.model_stock(np.array([[4.0, 6 * (-1 + 5e-7)], [6 * (-1 + 5e-7), 9.0]])) == [0.0, 0.0]


def middle(difference: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """By sorting: removes the int(gamma n) largest entries and keeps the int(density n) largest of the rest."""
    n = len(difference)
    stay, top = int(density * n), int(gamma * n)
    order = np.argsort(-np.abs(difference).astype(np.float32), kind="stable")
    top = max(0, min(top, n - stay))
    out = np.zeros(n)
    out[order[top : top + stay]] = difference[order[top : top + stay]]
    return out if density < 1 else difference


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize(
    ("density", "gamma"), [(0.9, 0.01), (0.5, 0.3), (0.1, 0.0), (0.95, 0.2), (1.0, 0.5), (1e-6, 0.1)]
)
def test_breadcrumbs_are_the_middle_entries(dtype: str, density: float, gamma: float) -> None:
    arrays = [BASE, *VECTORS[:2]]
    if dtype == "BF16":  # many magnitudes are equal: the first ones are kept
        bits = [bf16_bits(array) for array in arrays]
        arrays = [(one.astype(np.uint32) << 16).view(np.float32) for one in bits]
    base, *vectors = wide(*arrays)
    stored = bits if dtype == "BF16" else arrays
    weights, densities = [0.6, -0.3], [density, min(1.0, density * 1.01)]
    options = {"gamma": gamma, "scale": 0.8, "normalize": False}
    given = stored[1:], [dtype] * 2, weights, "F64"
    kind = np.float32 if dtype == "BF16" else np.float64
    left = [
        middle((vector.astype(kind) - base.astype(kind)), d, gamma)
        for vector, d in zip(vectors, densities, strict=True)
    ]
    for block, threads in ((1 << 16, 2), (999, 3)):
        more = {"base": (stored[0], dtype), "densities": densities, "block": block, "threads": threads}
        got = run("breadcrumbs", *given, **more, **options)
        wanted = base + 0.8 * (0.6 * left[0] - 0.3 * left[1])
        np.testing.assert_allclose(
            got, wanted, rtol=1e-6 if dtype == "BF16" else 1e-13, atol=1e-6 if dtype == "BF16" else 1e-12
        )
        weighted = np.stack([0.6 * left[0], -0.3 * left[1]])
        sign = np.where(weighted.sum(axis=0) >= 0, 1, -1)
        elected = (weighted * (np.sign(weighted) == sign)).sum(axis=0)
        got = run("breadcrumbs_ties", *given, **more, **options)
        np.testing.assert_allclose(
            got,
            base + 0.8 * elected,
            rtol=1e-6 if dtype == "BF16" else 1e-13,
            atol=1e-6 if dtype == "BF16" else 1e-12,
        )


def sce(base: np.ndarray, vectors: list[np.ndarray], share: float, kind: type) -> np.ndarray:
    """Select, calculate, erase, entry by entry, as arXiv 2408.07990 and mergekit define it."""
    offsets = np.stack([vector.astype(kind) - base.astype(kind) for vector in vectors])
    variance = np.var(offsets, axis=0).astype(np.float32)
    stay = int(np.count_nonzero(variance) * share)
    selected = np.zeros(len(base), bool)
    selected[np.argsort(-variance, kind="stable")[:stay]] = True
    if share >= 1:
        selected[:] = True
    left = (offsets * selected).astype(np.float64)
    weights = np.mean(left**2, axis=1)
    weights = weights / weights.sum() if weights.sum() >= 1e-6 else np.full(len(vectors), 1 / len(vectors))
    sign = np.where(left.sum(axis=0) >= 0, 1, -1)
    share_of = weights[:, None] * (np.sign(left) == sign)
    return base + (left * share_of).sum(axis=0) / np.maximum(share_of.sum(axis=0), 1e-6)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize(("share", "scale"), [(1.0, 1.0), (0.4, 1.0), (0.9, 1e-4), (0.0, 1.0), (1e-6, 1.0)])
def test_sce_selects_weighs_and_erases(dtype: str, share: float, scale: float) -> None:
    arrays = [BASE, *(BASE + (vector - BASE) * np.float32(scale) for vector in VECTORS)]
    stored = arrays
    if dtype == "BF16":  # many variances are equal: the first ones are selected
        stored = [bf16_bits(array) for array in arrays]
        arrays = [(one.astype(np.uint32) << 16).view(np.float32) for one in stored]
    kind = np.float32 if dtype == "BF16" else np.float64
    wanted = sce(*wide(arrays[0]), wide(*arrays[1:]), share, kind)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == "BF16" else {"rtol": 1e-12, "atol": 1e-12}
    found = set()
    for block, threads in ((1 << 16, 2), (999, 3)):
        got = run("sce", stored[1:], [dtype] * 3, [1.0] * 3, "F64", base=(stored[0], dtype), block=block,
                  threads=threads, select_topk=share)  # fmt: skip
        np.testing.assert_allclose(got, wanted, **close)
        found.add(got.tobytes())
    assert len(found) == 1


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4, 0.6, 0.8, 0.97])
def test_sce_s_last_selected_entry_is_found_in_any_block(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many equal variances in blocks of 64 and spans of 256 elements; the first ones are selected."""
    monkeypatch.setattr(sce_module, "ELEMENTS_PER_BLOCK", 64)
    monkeypatch.setattr(blocks, "ELEMENTS_PER_SPAN", 256)
    random = np.random.default_rng(0)
    base, *vectors = (random.integers(-2, 3, 1000).astype(np.float32) for _ in range(4))
    wanted = sce(base.astype(np.float64), wide(*vectors), share, np.float64)
    given = vectors, ["F32"] * 3, [1.0] * 3, "F64"
    got = run("sce", *given, base=(base, "F32"), block=100, select_topk=share)
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("error::RuntimeWarning")  # it would appear in the user's terminal
@pytest.mark.parametrize("passes", ["compiled", "numpy"])
@pytest.mark.parametrize("method", ["sce", "ties", "breadcrumbs", "multislerp", "karcher", "model_stock"])
def test_infinities_and_nan_are_data(method: str, passes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if passes == "numpy":
        monkeypatch.setattr(native, "compiled_function", lambda *_: None)
    rows = [array[:1000].copy() for array in (BASE, *VECTORS[:2])]
    for row in rows:
        row[:3] = np.inf, -np.inf, 1e38
    rows[1][3] = np.nan
    given = {"base": (rows[0], "F32"), "densities": [0.5, 0.4], "select_topk": 0.5}
    got = run(method, rows[1:], ["F32"] * 2, [0.7, 0.3], "F32", **given)
    assert not np.isfinite(got[:2]).any()
