"""`dromos recipe check --model`: what a model without numbers tells, beside the model that the ranks build."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_pipeline.errors import UserError
from launch.cli.app import app
from pretrain.build import encoders
from pretrain.build.freezing import training_table
from pretrain.build.model_check import check_model
from pretrain.build.objective import build
from pretrain.recipe.schema import TrainStage
from tests.support import tiny


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that the imports of torch's operators and the command line set; restored after a test."""
    monkeypatch.setenv(
        "TORCHINDUCTOR_CACHE_DIR", os.environ.get("TORCHINDUCTOR_CACHE_DIR", "/tmp/torchinductor")
    )
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", os.environ.get("TOKENIZERS_PARALLELISM", "false"))


def stage_of(recipe: dict[str, Any]) -> TrainStage:
    return TrainStage.model_validate({key: value for key, value in recipe.items() if key != "run"})


def test_the_model_without_numbers_has_the_table_of_the_real_one(
    tiny_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = {"lr": 0.1, "groups": [{"match": "connector", "lr": 1}]}
    for recipe in (tiny.flip_recipe(tiny_runs), tiny.sphinx_recipe(tiny_runs, optimizer=groups)):
        stage, run_dir = stage_of(recipe), tiny_runs / "runs" / recipe["run"]["name"]
        expected = training_table(build(stage, "main", 0, run_dir)[0], stage, 0.1)
        with monkeypatch.context() as patch:
            patch.setattr(encoders, "read_state", None)  # the weights of the tower are not read
            assert list(check_model(stage, "main", run_dir, 0.1)) == expected


def test_weights_that_do_not_fit_are_found_from_their_shapes(tiny_runs: Path) -> None:
    recipe = tiny.sphinx_recipe(tiny_runs, init=str(tiny_runs / "runs" / "sphinx" / "main"))
    run_dir = tiny_runs / "runs" / "other"
    list(check_model(stage_of(recipe), "main", run_dir, 0.1))
    recipe["model"]["llm"]["config"]["num_hidden_layers"] = 1
    with pytest.raises(
        UserError, match=r"llm\.model\.layers\.1\.\* \(9 tensors\): not used by the model(.|\n)*init_allow"
    ):
        list(check_model(stage_of(recipe), "main", run_dir, 0.1))
    recipe["model"]["llm"]["config"]["hidden_size"] = 64
    with pytest.raises(
        UserError, match=r"llm\.model\.norm\.weight: \(32,\) in the weights, \(64,\) in the model"
    ):
        list(check_model(stage_of(recipe), "main", run_dir, 0.1))


def checked(recipe: Path, *arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["recipe", "check", str(recipe), *arguments])
    return found.exit_code, found.output


def test_the_command_names_what_only_the_model_tells(tiny_runs: Path, tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", tiny.sphinx_recipe(tiny_runs))
    wrong = r"model.freeze=[vision, 'llm\.layers\..*']"
    assert checked(recipe, wrong)[0] == 0  # the text of the expression tells nothing
    code, printed = checked(recipe, "--model", wrong)
    assert code == 2
    assert "matches no parameter; nearest: llm.model.layers" in printed
    code, printed = checked(recipe, "--model", r"model.freeze=[vision, 'llm\..*']")
    assert (code, "data.text: no parameter that this stream uses is trained" in printed) == (2, True)
    code, printed = checked(recipe, "--model")
    assert code == 0
    assert "  vision     frozen" in printed
    assert "main: generative for 20 steps" in printed
    code, printed = checked(
        recipe, "--model", "run.dir=" + str(tmp_path / "run"), "model.vision.init=masked/main"
    )
    assert (code, "warning: the model is not checked: masked/main" in printed) == (0, True)
    code, printed = checked(recipe, "--model", "init=masked/main")
    assert (code, "warning: the weights of init are not checked: masked/main" in printed) == (0, True)
    assert "  vision     frozen" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]  # nothing is written
