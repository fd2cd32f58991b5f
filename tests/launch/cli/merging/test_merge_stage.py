"""Which merges a job still has to do: none that is done, and one of weights that the job is about to change."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from data_pipeline.errors import UserError
from launch.job import Job, StageJob
from launch.stage_state import is_done
from launch.supervise.stage_runner import undone
from pretrain.merge_stage import run_merge_stage
from pretrain.recipe.schema import MergeStage, Objective, Recipe, Train, TrainStage
from tests.support.merge_inputs import floats
from tests.support.zero_runs import finish, recipe, training

pytest.importorskip("torch")


@pytest.fixture
def run(tmp_path: Path) -> tuple[Recipe, Path]:
    """real and synthetic, one step each, and their finished mix."""
    made = recipe(tmp_path / "r", real=training(), synthetic=training(), mix=mix())
    for seed, name in enumerate(("real", "synthetic")):
        finish(made, name, tmp_path / "r", {"w": floats(seed, 5, 2)})
    run_merge_stage(made, "mix", tmp_path / "r")
    return made, tmp_path / "r"


def mix() -> MergeStage:
    return MergeStage(kind="merge", inputs={"real": 0.4, "synthetic": 0.6})


def job(made: Recipe, run_dir: Path) -> Job:
    stages = [
        StageJob(name, stage.kind, int(stage.train.steps or 0) if isinstance(stage, TrainStage) else None)
        for name, stage in made.stages.items()
    ]
    return Job(recipe="r.yaml", run_dir=str(run_dir), stages=tuple(stages))


def left(made: Recipe, run_dir: Path) -> list[str]:
    return [stage.name for stage in undone(job(made, run_dir), made, Console(file=io.StringIO()))]


def test_a_merge_is_done_until_its_inputs_change(run: tuple[Recipe, Path]) -> None:
    made, run_dir = run
    assert left(made, run_dir) == []
    manifest = run_dir / "real/checkpoints/step_00000001/manifest.json"
    manifest.write_text(json.dumps({"mp_rank_00_model_states.pt": {"xxh64": "1" * 16, "size": 0}}))
    with pytest.raises(UserError, match=r"real: .*0{16} -> 1{16}"):
        is_done(run_dir, StageJob("mix", "merge"), made)


def test_a_merge_of_a_stage_that_is_left_is_left_too(run: tuple[Recipe, Path]) -> None:
    _, run_dir = run
    longer = TrainStage(objective=Objective(kind="flip"), train=Train(steps=2))
    lengthened = recipe(run_dir, real=longer, synthetic=training(), mix=mix())
    assert left(lengthened, run_dir) == ["real", "mix"]
