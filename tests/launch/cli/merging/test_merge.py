"""`dromos merge` from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner, Result

from launch.cli.base import group
from launch.cli.merging import merge
from tests.support.merge_inputs import floats, write


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        write(tmp_path / name, {"llm.w": floats(seed, 4, 3), "head": floats(seed + 5, 2)})
    return "./a", "./b"


def dromos(*words: str) -> Result:
    app = group("test")
    merge.register(app)
    app.command(name="other")(lambda: None)  # a group of one command would take no name
    return CliRunner().invoke(app, list(words))


def test_merge(pair: tuple[str, str], tmp_path: Path) -> None:
    result = dromos("merge", *pair, "--beta", "0.4", "--out", "mix")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-2] == "mix = 0.4 x ./a + 0.6 x ./b"
    assert "mix: 2 tensors mixed, 0 copied" in result.output
    a, b, got = (load_file(f"{x}/model.safetensors")["llm.w"].astype(np.float64) for x in (*pair, "mix"))
    np.testing.assert_array_equal(got, (0.4 * a + 0.6 * b).astype(np.float32))
    again = dromos("merge", *pair, "--beta", "0.4", "--out", "mix")
    assert again.exit_code == 0
    assert "already complete" in again.output
    other = dromos("merge", *pair, "--beta", "0.5", "--out", "mix")
    assert other.exit_code == 2
    assert "another merge" in other.output


def test_weights_only_and_copy_rest(pair: tuple[str, str]) -> None:
    words = ("--weights", "1,3", "--only", "^llm", "--copy-rest", "A", "--out", "mix")
    result = dromos("merge", *pair, *words)
    assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(
        load_file("mix/model.safetensors")["head"], load_file("a/model.safetensors")["head"]
    )


def test_dry_run_prints_the_plan_and_writes_nothing(pair: tuple[str, str], tmp_path: Path) -> None:
    result = dromos("merge", *pair, "--beta", "0.4", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "theta = 0.4 x A + 0.6 x B" in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("merge", "./a", "./b", "--out", "x"), "set the weights of the inputs"),
        (("merge", "./a", "./b", "--beta", "0.5"), "--out DIR is missing"),
        (("merge", "./a", "./b", "--weights", "1;2", "--out", "x"), "numbers with commas"),
        (("merge", "./a", "./nothing", "--beta", "0.5", "--out", "x"), "./nothing: not found"),
        (("merge", "real", "./b", "--beta", "0.5", "--out", "x"), "RUN/STAGE"),
        (("merge", "./a", "--weights", "1", "--out", "x"), "two inputs or more"),
        (("merge", "./a", "./b", "--beta", "0.5", "--dtype", "int3", "--out", "x"), "bf16, fp16, fp32"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(
    pair: tuple[str, str], tmp_path: Path, words: tuple[str, ...], why: str
) -> None:
    result = dromos(*words)
    assert result.exit_code == 2
    assert why in result.output
    assert "Traceback" not in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_help_says_what_beta_means() -> None:
    text = " ".join(dromos("merge", "--help").output.split())
    assert "theta = beta * A + (1 - beta) * B" in text
