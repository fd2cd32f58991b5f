"""Distances equal those of numpy in float64 on whole arrays; tensors that cannot be compared are reported."""

from __future__ import annotations

import csv
import io
import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pretrain.merge.diff.compare import as_csv, diff, lines, module_of, places_of
from pretrain.merge.diff.heatmap import picture
from pretrain.merge.figures import ramp, ticks
from tests.support.merge_inputs import floats, write, write_bf16

LONG = (1 << 21) + 12_345  # more than one span, and not a multiple of the block length


def brute_force(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return {
        "elements": x.size,
        "relative_l2": float(np.linalg.norm(y - x) / np.linalg.norm(x)),
        "cosine": float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y))),
        "max_abs": float(np.abs(y - x).max()),
        "sign_agreement": float(np.mean(np.sign(x) == np.sign(y))),
        "equal": float(np.mean(x == y)),
        "not_finite": 0,
    }


def test_distances_are_those_of_whole_arrays(tmp_path: Path) -> None:
    a = {"long": floats(1, LONG), "half": floats(2, 40, 3).astype(np.float16), "n": np.arange(-5, 60)}
    b = {
        name: (value + (floats(9, *value.shape) * 3).astype(value.dtype)).astype(value.dtype)
        for name, value in a.items()
    }
    a["long"][:1000] = b["long"][:1000] = 0
    a["half"][3] = 0
    found = diff(str(write(tmp_path / "a", a)), str(write(tmp_path / "b", b)), threads=2)
    assert {row.name for row in found.rows} == set(a)
    for row in found.rows:
        assert row.distance.plain() == pytest.approx(brute_force(a[row.name], b[row.name]), rel=1e-11)
    alone = diff(str(tmp_path / "a"), str(tmp_path / "b"), threads=1)
    assert alone.rows == found.rows


def test_bf16_is_compared_by_value_and_with_fp32(tmp_path: Path) -> None:
    values = {"w": floats(3, 500)}
    a = write_bf16(tmp_path / "a", values)
    cut = (values["w"].view(np.uint32) & 0xFFFF0000).view(np.float32)
    b = write(tmp_path / "b", {"w": cut * 2})
    found = diff(str(a), str(b)).rows[0]
    assert found.dtypes == ("BF16", "F32")
    assert found.distance.relative == pytest.approx(1.0, rel=1e-12)
    assert found.distance.sign_agreement == 1.0
    assert diff(str(a), str(write(tmp_path / "c", {"w": cut}))).same


def test_sums_over_modules_and_layers(tmp_path: Path) -> None:
    names = [f"m.layers.{i}.{part}.weight" for i in (0, 1, 10) for part in ("attn.q", "mlp")]
    a = {name: floats(i, 6, 5) for i, name in enumerate([*names, "head.weight"])}
    b = {name: value + 0.1 * floats(90, 6, 5) for name, value in a.items()}
    found = diff(str(write(tmp_path / "a", a)), str(write(tmp_path / "b", b)))
    modules = found.modules(2)
    assert set(modules) == {"m.layers.*.attn", "m.layers.*.mlp", "head"}
    x = np.concatenate([a[n].ravel() for n in names if "attn" in n]).astype(np.float64)
    y = np.concatenate([b[n].ravel() for n in names if "attn" in n]).astype(np.float64)
    assert modules["m.layers.*.attn"].plain() == pytest.approx(brute_force(x, y), rel=1e-11)
    assert set(found.modules(1)) == {"m.layers.*", "head"}
    assert found.total.count == 7 * 30
    assert found.farthest(2)[0].distance.relative == max(r.distance.relative for r in found.rows)


@pytest.mark.parametrize(
    ("names", "name", "place"),
    [
        (("l.0.a.w", "l.1.a.w"), "l.1.a.w", ("l", 1, "a")),
        (("v.0.blocks.0.mlp.w", "v.0.blocks.1.mlp.w"), "v.0.blocks.1.mlp.w", ("v.0.blocks", 1, "mlp")),
        (
            ("l.0.experts.0.w1.w", "l.0.experts.1.w1.w", "l.1.experts.0.w1.w"),
            "l.0.experts.1.w1.w",
            ("l", 0, "experts.*.w1"),
        ),
        (("projector.0.weight", "projector.2.weight"), "projector.2.weight", ("", None, "projector.2")),
        (("w",), "w", ("", None, "w")),
    ],
)  # fmt: skip
def test_places_of_names(names: tuple[str, ...], name: str, place: tuple[str, int | None, str]) -> None:
    found = places_of(names)[name]
    assert (found.stack, found.layer, found.part) == place
    assert module_of(found, 1) == (f"{place[0]}.*" if place[0] else place[2].split(".")[0])


def test_other_names_and_shapes_are_reported(tmp_path: Path) -> None:
    a = {"same": floats(1, 3), "grown": floats(2, 3, 2), "l.0.x.w": floats(3, 2), "l.1.x.w": floats(3, 2)}
    b = {"same": floats(1, 3), "grown": floats(2, 4, 2), "new": floats(4, 2)}
    found = diff(str(write(tmp_path / "a", a)), str(write(tmp_path / "b", b)))
    assert found.only_a == ("l.0.x.w", "l.1.x.w")
    assert found.only_b == ("new",)
    assert found.reshaped == {"grown": ((3, 2), (4, 2))}
    assert not found.same
    shown = "\n".join(lines(found, 2, 5))
    assert "only in A: l.*.x.w (2 tensors)" in shown
    assert "only in B: new" in shown
    assert "shape: grown  [3, 2] in A, [4, 2] in B" in shown
    assert "nothing" not in shown


def test_elements_that_are_not_finite_are_counted_and_left_out(tmp_path: Path) -> None:
    a, b = floats(1, 100), floats(2, 100)
    a[3], b[4], a[5], b[5] = np.nan, np.inf, np.inf, np.inf
    keep = [i for i in range(100) if i not in (3, 4, 5)]
    found = diff(str(write(tmp_path / "a", {"w": a})), str(write(tmp_path / "b", {"w": b})))
    figures = found.rows[0].distance.plain()
    want = brute_force(a[keep], b[keep]) | {"elements": 100, "not_finite": 3, "equal": 0.01}
    assert figures == pytest.approx(want, rel=1e-12)
    assert "not finite: w  3 elements" in "\n".join(lines(found, 2, 5))


def test_zeros_have_no_direction(tmp_path: Path) -> None:
    a, b = (
        {"z": np.zeros(4, np.float32), "e": np.zeros((0, 3), np.float32)},
        {"z": floats(1, 4), "e": np.zeros((0, 3), np.float32)},
    )
    found = diff(str(write(tmp_path / "a", a)), str(write(tmp_path / "b", b)))
    by_name = {row.name: row.distance for row in found.rows}
    assert by_name["z"].relative == math.inf
    assert by_name["z"].plain()["relative_l2"] is None
    assert by_name["z"].cosine is None
    assert (by_name["e"].relative, by_name["e"].equal_share) == (0.0, 1.0)
    json.dumps(found.plain(2), allow_nan=False)
    ElementTree.fromstring(picture(found))


def test_a_model_and_itself(tmp_path: Path) -> None:
    a = write(tmp_path / "a", {"l.0.m.w": floats(1, 5), "l.1.m.w": floats(2, 5)})
    found = diff(str(a), str(a))
    assert found.same
    assert "the same: 2 tensors, 10 elements" in "\n".join(lines(found, 3, 5))
    assert "all elements are equal" in picture(found)


def test_csv_has_a_row_per_tensor(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {"h.w": floats(1, 2, 3)}), write(tmp_path / "b", {"h.w": floats(2, 2, 3)})
    found = diff(str(a), str(b))
    (row,) = csv.DictReader(io.StringIO(as_csv(found, 3)))
    assert (row["name"], row["module"], row["shape"], row["dtype_a"]) == ("h.w", "h", "2x3", "F32")
    assert float(row["relative_l2"]) == found.rows[0].distance.relative


def test_the_picture_has_a_cell_per_module_and_layer(tmp_path: Path) -> None:
    a = {f"m.{i}.{part}<&.w": floats(i, 4) for i in range(3) for part in ("x", "y")} | {"head": floats(8, 2)}
    b = {name: value * 1.5 for name, value in a.items()}
    save_folder = tmp_path / 'b "quoted" <&'
    save_folder.mkdir()
    save_file(b, save_folder / "model.safetensors")
    drawn = picture(diff(str(write(tmp_path / "a", a)), str(save_folder)))
    root = ElementTree.fromstring(drawn)  # well-formed, whatever names hold
    tips = [tip.text or "" for tip in root.iter("{http://www.w3.org/2000/svg}title")]
    cells = [tip for tip in tips if ", layer " in tip]
    assert len(cells) == 6
    assert all("|B-A|/|A| 0.5," in tip for tip in cells)
    assert sum("x<&: " in tip for tip in tips) == 1


def test_ticks_are_round_and_cover() -> None:
    for low, high in ((0.0, 1.0), (0.7134, 0.7201), (-3.0, 47.0), (5.0, 5.0), (1e-7, 3e-7)):
        found = ticks(low, high)
        assert found[0] <= low
        assert found[-1] >= high
        assert 3 <= len(found) <= 9
        assert len({f"{v:.6g}" for v in found}) == len(found)
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert (ramp(0), ramp(1)) == ("#f7fbf0", "#0b1f4f")


def test_counters_and_positions_are_in_no_sum(tmp_path: Path) -> None:
    a = {"norm.w": floats(1, 9), "norm.batches": np.array([2**40]), "positions.ids": np.arange(6)}
    b = {"norm.w": floats(2, 9), "norm.batches": np.array([2**41]), "positions.ids": np.arange(6)}
    found = diff(str(write(tmp_path / "a", a)), str(write(tmp_path / "b", b)))
    want = brute_force(a["norm.w"], b["norm.w"])
    assert found.total.plain() == pytest.approx(want, rel=1e-11)
    assert found.modules(3) == {"norm": found.rows[[r.name for r in found.rows].index("norm.w")].distance}
    assert [row.name for row in found.farthest(5)] == ["norm.w"]
    shown = "\n".join(lines(found, 3, 5))
    assert "integer: norm.batches  1 of 1 elements differ; not in the sums" in shown
    assert "integer: positions.ids  6 elements, all equal; not in the sums" in shown
    assert ">positions" not in picture(found)
    assert {"norm.batches", "positions.ids"} <= {t["name"] for t in found.plain(3)["tensors"]}


def test_integers_alone_are_compared_as_numbers(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {"w": np.arange(1, 4)}), write(tmp_path / "b", {"w": 2 * np.arange(1, 4)})
    assert diff(str(a), str(b)).total.relative == 1.0


def test_tensors_that_are_zero_in_a_come_last(tmp_path: Path) -> None:
    a = {"q.bias": np.zeros(4, np.float32), "q.weight": floats(1, 5), "v.bias": np.zeros(2, np.float32)}
    b = {name: value + floats(3, *value.shape) for name, value in a.items()}
    found = diff(str(write(tmp_path / "a", a)), str(write(tmp_path / "b", b)))
    assert [row.name for row in found.farthest(3)] == ["q.weight", "q.bias", "v.bias"]
    assert "A is 0" in "\n".join(lines(found, 3, 3))
    drawn = picture(found)
    assert "brown: A is 0" in drawn
    assert drawn.count('fill="#e9c8b4"') == 1  # v alone; q has a weight too


def test_a_picture_of_nothing_does_not_call_it_equal(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {"x": floats(1, 5)}), write(tmp_path / "b", {"y": floats(2, 5)})
    drawn = picture(diff(str(a), str(b)))
    assert "no tensor to compare" in drawn
    assert "equal" not in drawn
    assert "max-width:100%" in drawn


@pytest.mark.parametrize("large", [1e200, 5e151])
def test_numbers_whose_squares_fp64_does_not_hold(tmp_path: Path, large: float) -> None:
    """Sums of blocks that are infinite, or finite but infinite together."""
    x = np.full(200_000, large)
    x[:70_000] *= -1
    a, b = (str(write(tmp_path / n, {"w": w})) for n, w in (("a", x), ("b", np.full(200_000, large))))
    total = diff(a, b).total
    assert total.max_abs == 2 * large
    assert total.sign_agreement == 0.65
    assert total.cosine is None
