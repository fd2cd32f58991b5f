"""Merge stages in a job: which remain, how often their inputs are opened and hashed, and stop signals."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from launch.job import StageJob
from launch.run import run as run_job
from launch.stage_state import stage_states
from pretrain import merge_stage
from pretrain.merge.planning import inputs
from pretrain.merge_stage import run_merge_stage
from pretrain.recipe.kinds.contrastive import ContrastiveOptions
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import MergeStage, Recipe, Train, TrainStage
from pretrain.weights.source import WeightSource
from tests.support.commands import Command
from tests.support.launching import wait_for, write_recipe
from tests.support.merge_inputs import floats
from tests.support.zero_runs import finish, recipe, training

pytest.importorskip("torch")


@pytest.fixture
def run(tmp_path: Path) -> tuple[Recipe, Path]:
    """The stages real and synthetic, trained for one step each, and their finished merge."""
    made = recipe(tmp_path / "r", real=training(), synthetic=training(), mix=mix())
    for seed, name in enumerate(("real", "synthetic")):
        finish(made, name, tmp_path / "r", {"w": floats(seed, 5, 2)})
    run_merge_stage(made, "mix", tmp_path / "r")
    return made, tmp_path / "r"


def mix() -> MergeStage:
    return MergeStage(kind="merge", inputs={"real": 0.4, "synthetic": 0.6})


def remaining(made: Recipe, run_dir: Path) -> list[str]:
    stages = [
        StageJob(name, stage.kind, int(stage.train.steps or 0) if isinstance(stage, TrainStage) else None)
        for name, stage in made.stages.items()
    ]
    states = stage_states(made, stages, run_dir)
    return [stage.name for stage in states.remaining]


def test_a_merge_is_done_until_its_inputs_change(run: tuple[Recipe, Path]) -> None:
    made, run_dir = run
    assert remaining(made, run_dir) == []
    manifest = run_dir / "real/checkpoints/step_00000001/manifest.json"
    manifest.write_text(json.dumps({"mp_rank_00_model_states.pt": {"xxh64": "1" * 16, "size": 0}}))
    with pytest.raises(UserError, match=r"real: .*0{16} -> 1{16}"):
        remaining(made, run_dir)


def test_a_merge_of_a_stage_that_remains_remains(run: tuple[Recipe, Path]) -> None:
    _, run_dir = run
    longer = TrainStage(objective=ContrastiveOptions(kind="contrastive"), train=Train(steps=2))
    lengthened = recipe(run_dir, real=longer, synthetic=training(), mix=mix())
    assert remaining(lengthened, run_dir) == ["real", "mix"]


def recipe_with_merge(folder: Path) -> Path:
    """A recipe file whose training stages `masked` and `tuned` are finished, and whose stage `mix` merges them."""
    path = write_recipe(folder)
    text = path.read_text().replace("steps: 20", "steps: 1").replace("steps: 10", "steps: 1")
    path.write_text(text + "  mix: {kind: merge, inputs: {masked: 0.4, tuned: 0.6}}\n")
    loaded = load_recipe(path)
    for seed, name in enumerate(("masked", "tuned")):
        finish(loaded, name, folder / "run", {"w": floats(seed, 5, 2)})
    return path


def test_a_command_checks_opens_and_hashes_the_inputs_of_a_merge_stage_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checked: list[Path] = []
    opened: list[str] = []
    hashed: list[str] = []
    is_finished, open_weights, hashes = merge_stage.is_finished, inputs.open_weights, WeightSource.hashes

    def count_check(stage: MergeStage, folder: Path) -> bool:
        checked.append(folder)
        return is_finished(stage, folder)

    def count_open(address: str, run_dir: Path | None = None, key: str | None = None) -> WeightSource:
        opened.append(address)
        return open_weights(address, run_dir, key)

    def count_hash(source: WeightSource) -> dict[str, str]:
        hashed.append(source.address)
        return hashes(source)

    monkeypatch.setattr(merge_stage, "is_finished", count_check)
    monkeypatch.setattr(inputs, "open_weights", count_open)
    monkeypatch.setattr(WeightSource, "hashes", count_hash)
    path = str(recipe_with_merge(tmp_path))
    for printed in ("mix: merging", "mix: done"):
        for calls in (checked, opened, hashed):
            calls.clear()
        assert run_job(path, ranks_per_node=1) == 0
        output = capsys.readouterr().out
        assert printed in output
        assert ("mix: note: " in output) == (printed == "mix: merging")
        assert checked == [tmp_path / "run" / "mix"]
        assert opened == hashed == ["masked", "tuned"]


@pytest.mark.parametrize(
    ("function", "number"),
    [
        ("merge_locally", signal.SIGINT),
        ("merge_locally", signal.SIGTERM),
        ("merge_locally", signal.SIGHUP),
        ("merge_under_slurm", signal.SIGTERM),
        # The sbatch script sends this signal to srun, which forwards it.
        ("merge_under_slurm", signal.SIGUSR1),
    ],
)
def test_a_merge_stopped_by_a_signal_exits_with_75(
    tmp_path: Path, function: str, number: signal.Signals
) -> None:
    path = recipe_with_merge(tmp_path)
    process = Command("tests.launch.cli.merging.slow_merge", function, [str(path)], tmp_path, os.environ)
    try:
        wait_for((tmp_path / "started").exists, "the merge to start")
        process.send_signal(number)
        output = "".join(process.communicate(timeout=30))
    finally:
        process.kill()
    assert process.returncode == 75, output
    assert "mix: interrupted" in output
    assert function != "merge_locally" or f"to resume: dromos run {path} --stage mix" in output
