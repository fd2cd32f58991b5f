"""Elements that become infinite or NaN from finite inputs: every path counts them, also after a kill, and warns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from launch.cli.app import app
from pretrain.merge import merge
from pretrain.merge.methods import blocks, native
from pretrain.merge.output import journal, local, overflow
from pretrain.weights import dtypes
from tests.support.merge_inputs import write
from tests.support.scorers import scorer

SPAN = 64


@pytest.fixture(params=["compiled", "numpy"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(native, "compiled_function", lambda *_: None)
    elif native.compiled_function("products") is None:
        pytest.skip("the passes were not built: no compiler")
    return request.param


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three fp16 models of large numbers with a few infinities and NaN."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        random = np.random.default_rng(seed)
        large = (random.standard_normal(1500) * 30_000).clip(-65_000, 65_000).astype(np.float16)
        large[random.choice(1500, 5)] = np.inf
        large[random.choice(1500, 5)] = np.nan
        write(tmp_path / name, {"large": large, "small": (large / 1000).astype(np.float16)})
    return tmp_path


def expected(out: str, *inputs: str) -> dict[str, int]:
    """Overflow counts, computed from the files alone."""
    found = {}
    held = [load_file(f"{name}/model.safetensors") for name in inputs]
    for name, array in load_file(f"{out}/model.safetensors").items():
        finite = np.logical_and.reduce([np.isfinite(one[name]) for one in held])
        if count := np.count_nonzero(~np.isfinite(array) & finite):
            found[name] = int(count)
    return found


@pytest.mark.parametrize(
    ("method", "asked"),
    [
        ("linear", {"weights": [1.5, -0.8]}),
        ("slerp", {"t": 0.5}),
        ("task_arithmetic", {"weights": [1.0, 1.0], "base": "c"}),
        ("ties", {"weights": [1.0, 2.0], "base": "c", "density": 0.7, "normalize": False}),
        ("dare_linear", {"weights": [1.0, 1.0], "base": "c", "density": 0.4}),
        ("dare_ties", {"weights": [1.0, 1.0], "base": "c", "density": 0.4}),
    ],
)
def test_counted_by_every_method(models: Path, passes: str, method: str, asked: dict[str, Any]) -> None:
    record = merge(["a", "b"], "out", method=method, **asked)
    counted = expected("out", "a", "b", *([asked["base"]] if "base" in asked else []))
    assert record["overflow"] == counted
    assert set(counted) <= {"large"}
    assert counted or method == "slerp"
    assert json.loads(Path("out/merge.json").read_text())["overflow"] == counted


def test_wider_outputs_do_not_overflow(models: Path, passes: str) -> None:
    for dtype in ("bf16", "fp32", "fp64"):
        assert merge(["a", "b"], dtype, weights=[1.5, -0.8], dtype=dtype)["overflow"] == {}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sums_that_overflow_on_the_way(tmp_path: Path, passes: str, dtype: str) -> None:
    """Overflow of fp64, and of the output type; NaN from infinity minus infinity, where both inputs are finite."""
    x = np.array([1e308, 1e300, 1e39, 1.0, np.inf, np.nan, 3.4e38])
    write(tmp_path / "a", {"w": x})
    write(tmp_path / "b", {"w": np.where(np.isfinite(x), x, 1.0)})
    inputs = [str(tmp_path / name) for name in "ab"]
    record = merge(inputs, tmp_path / "out", weights=[1e3, -999.0], dtype=dtype)
    wanted = {"w": 3 if dtype == "fp32" else 4}
    assert record["overflow"] == wanted
    record = merge(inputs, tmp_path / "other", weights=[2.0, -1.0], dtype=dtype)
    assert record["overflow"] == wanted


def test_counts_survive_a_kill(models: Path, passes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (blocks, dtypes, local):
        monkeypatch.setattr(module, "ELEMENTS_PER_SPAN", SPAN)
    whole = merge(["a", "b"], "whole", weights=[1.5, -0.8])
    real, added = journal.Journal.add, []

    class Stopped(BaseException):
        pass

    def add(self: journal.Journal, *entry: Any) -> None:
        if len(added) == 14:
            raise Stopped
        added.append(entry)
        real(self, *entry)

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "add", add)
        with pytest.raises(Stopped):
            merge(["a", "b"], "out", weights=[1.5, -0.8])
    assert sum(record.overflow for _, _, record in added) > 0
    record = merge(["a", "b"], "out", weights=[1.5, -0.8])
    assert record["overflow"] == whole["overflow"] == expected("out", "a", "b")


def test_journal_lines_without_counts_are_ignored(tmp_path: Path) -> None:
    (tmp_path / journal.JOURNAL).write_text('{"plan":1}\n[0,0,"0123456789abcdef",["0123456789abcdef"]]\n')
    assert journal.Journal(tmp_path, {"plan": 1}).done == {}


def test_a_sweep_counts_by_output(models: Path, passes: str) -> None:
    from pretrain.merge import sweep

    for x in "xy":
        Path(x).mkdir()
    rows = np.array([[70_000.0, 65_519.0, 65_520.0, 1.0]], np.float32)
    write(Path("x"), {"w": rows})
    write(Path("y"), {"w": rows / 2})
    folders = sweep("x", "y", [0.0, 0.5, 1.0], "s", dtype="fp16")
    counts = {
        beta: json.loads(Path(folder, "merge.json").read_text())["overflow"]
        for beta, folder in folders.items()
    }
    assert counts == {0.0: {}, 0.5: {}, 1.0: {"w": 2}}


def test_the_command_warns_and_says_what_to_do(models: Path) -> None:
    asked = ["merge", "./a", "./b", "--weights", "1.5,-0.8", "--out", "out"]
    for _ in range(2):  # also for an output that is already complete
        result = CliRunner().invoke(app, asked)
        assert result.exit_code == 0, result.output
        (note,) = [line for line in result.stderr.splitlines() if line.startswith("note: out: ")]
        count = expected("out", "a", "b")["large"]
        assert f"{count:,} elements became infinite or NaN" in note
        assert f"too large for F16 (large {count:,})" in note
        assert "--dtype bf16 or fp32" in note
    checked = CliRunner().invoke(app, ["verify", "out"])
    assert f"{count:,} of them come from the merge, too large for F16" in checked.output
    quiet = CliRunner().invoke(app, ["merge", "./a", "./b", "--beta", "0.5", "--out", "mean"])
    assert quiet.exit_code == 0, quiet.output
    assert "infinite" not in quiet.output


def test_sweeps_and_soups_warn_too(models: Path) -> None:
    for name, scale in (("x", 1), ("y", 3)):
        write(Path(name), {"w": np.full((2, 3), 60_000.0 * scale, np.float32)})
    command = scorer(models, "print(1.0)")
    asked = ["./x", "./y", "--dtype", "fp16", "--out"]
    sweep = ["sweep", "--betas", "0,0.5,1"]
    for out, words in (
        ("kept", sweep),
        ("scored", [*sweep, "--no-keep", "--eval-cmd", command]),
        ("soup", ["soup", "--uniform"]),
    ):
        result = CliRunner().invoke(app, [*words, *asked, out])
        assert result.exit_code == 0, result.output
        (note,) = [line for line in result.stderr.splitlines() if "infinite" in line]
        assert "6 elements became infinite or NaN" in note
        assert note.startswith("note: the soup: " if out == "soup" else "note: beta 0: ")
        assert ("1 other output has" in note) == (out != "soup")


@pytest.mark.parametrize("others", [0, 2])
def test_the_warning_names_the_worst_output(others: int) -> None:
    record = {
        "overflow": {"a": 3, "b": 1200, "c": 1, "d": 2},
        "jobs": [{"name": n, "dtype": "F16"} for n in "abcde"],
    }
    few = {"overflow": {"a": 1}, "jobs": record["jobs"]}
    warning = overflow.overflow_warning(
        {"beta 1": record, **{f"beta {i}": few for i in range(2, 2 + others)}, "clean": {"overflow": {}}}
    )
    assert warning is not None
    assert warning.startswith("beta 1: 1,206 elements became infinite or NaN")
    assert "(b 1,200, a 3, d 2, and 1 more tensors)" in warning
    assert ("2 other outputs have" in warning) == bool(others)
    assert overflow.overflow_warning({"clean": {"overflow": {}}, "older": {}}) is None
