"""Submission to Slurm, with scripts in place of sbatch and scontrol: the recipe a job reads, and the messages."""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from data_pipeline.errors import UserError
from launch.job import Job
from launch.ray.submit import MAX_ENV_BYTES, PAYLOAD, read_payload, submission
from launch.run import make_job, run
from launch.run_folder import open_run
from launch.slurm import sbatch
from pretrain.recipe.dump import dump
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import TrainStage
from tests.support.launching import write_recipe


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in the working directory, and a bin folder ahead of PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path)


def program(recipe: Path, name: str, body: str) -> None:
    path = recipe.parent / "bin" / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def keep_scripts(recipe: Path) -> None:
    """An sbatch that keeps a copy of the script at submission, as Slurm's does."""
    program(
        recipe,
        "sbatch",
        'number=$(ls queue.* 2>/dev/null | wc -l)\ncp "${@: -1}" queue.$number\necho $number',
    )


def queued(recipe: Path, number: int) -> list[str]:
    """Words of the line in a queued script that starts the first stage's ranks."""
    lines = (recipe.parent / f"queue.{number}").read_text().splitlines()
    return shlex.split(next(line for line in lines if "launch.cli train" in line).partition(" || ")[0])


def rate(recipe_path: str) -> float:
    stage = load_recipe(recipe_path).stages["masked"]
    assert isinstance(stage, TrainStage)
    return stage.optimizer.lr or 0


def test_a_queued_slurm_job_keeps_its_recipe(recipe: Path) -> None:
    keep_scripts(recipe)
    assert run(str(recipe), on="slurm", ranks_per_node=1, overrides=["optimizer.lr=1e-4"]) == 0
    assert run(str(recipe), on="slurm", ranks_per_node=1, overrides=["optimizer.lr=2e-4"]) == 0
    for number, lr in enumerate((1e-4, 2e-4)):
        words = queued(recipe, number)
        path = words[words.index("train") + 1]
        assert rate(path) == lr
        script = (recipe.parent / f"queue.{number}").read_text()
        assert f"launch.slurm.job_step state {path} masked" in script
    assert rate("run/recipe.yaml") == 2e-4


def test_a_waiting_ray_job_keeps_its_recipe(recipe: Path) -> None:
    jobs: list[Job] = []
    for rate_given in ("1e-4", "2e-4"):
        loaded = load_recipe(recipe, [f"optimizer.lr={rate_given}"])
        jobs.append(make_job(loaded, str(recipe), on="ray", ranks_per_node=1))
        open_run(jobs[-1], loaded)
    for job, lr in zip(jobs, (1e-4, 2e-4), strict=True):
        command = job.train_command("masked")
        assert rate(command[command.index("train") + 1]) == lr


def with_classes(recipe: Path, name: str, names: list[str]) -> None:
    """Add a zero-shot evaluation with one class per name, as large as that of ImageNet-21k."""
    classes = "".join(f"        '{number}': {text}\n" for number, text in enumerate(names))
    task = f"path: {recipe.parent / 'data'}\n      templates: ['{{}}']\n      classes:\n{classes}"
    recipe.write_text(
        recipe.read_text().partition("eval:")[0] + f"eval:\n  zero_shot:\n    {name}:\n      {task}"
    )


def test_a_large_recipe_reaches_the_driver_of_a_ray_job(recipe: Path) -> None:
    with_classes(recipe, "words", [f"a thing called number {number}" for number in range(3000)])
    text = dump(load_recipe(recipe))
    assert len(text) > 131072
    job = make_job(load_recipe(recipe), str(recipe), on="ray", ranks_per_node=1)
    payload = submission(job, text)["runtime_env"]["env_vars"][PAYLOAD]
    assert subprocess.run(["true"], env={PAYLOAD: payload}).returncode == 0  # the kernel takes it
    assert read_payload(payload) == (job, text)
    noise = "".join(secrets.token_hex(32) for _ in range(4000))
    with pytest.raises(UserError, match=f"at most {MAX_ENV_BYTES:,}"):
        submission(job, noise)


def answers(recipe: Path, *states: str) -> None:
    """An scontrol that answers with these states, one per call; `-` is an error, as is every call after the last."""
    program(
        recipe,
        "scontrol",
        f"states=({' '.join(states)})\ncount=$(cat calls 2>/dev/null || echo 0)\necho $((count + 1)) > calls\n"
        'state=${states[$count]:--}\n[ "$state" = - ] && { echo "slurm_load_jobs error" >&2; exit 1; }\n'
        'echo "JobId=7 JobState=$state ExitCode=0:0"',
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record sleeps instead of sleeping."""
    slept: list[float] = []
    monkeypatch.setattr(sbatch.time, "sleep", slept.append)
    return slept


def wait(recipe: Path) -> int:
    return sbatch.wait_for("7", make_job(load_recipe(recipe), str(recipe), on="slurm"), Console())


def test_a_controller_that_is_busy_is_asked_again(
    recipe: Path, quick: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    answers(recipe, "RUNNING", "-", "-", "RUNNING", "-", "-", "-", "-", "-", "COMPLETED")
    assert wait(recipe) == 0
    assert quick == [2, 2, 4, 2, 2, 4, 8, 16, 32]
    assert capsys.readouterr().out == "job 7: running\njob 7: completed\n"


def test_a_job_that_slurm_has_forgotten_is_told_in_words(
    recipe: Path, quick: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    answers(recipe, "RUNNING")
    assert wait(recipe) == 1
    assert sum(quick) > 60
    assert f"see how it ended in {recipe.parent}/run/slurm-7.log" in capsys.readouterr().out


def test_to_stop_waiting_is_not_to_be_saved(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 75 would mean that the job saved and stopped, but it still runs."""
    answers(recipe, "RUNNING")
    monkeypatch.setattr(sbatch.time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGINT))
    assert wait(recipe) == 1
    assert "job 7 continues to run; `scancel 7` ends it" in capsys.readouterr().out


def test_a_refused_job_leaves_the_folder_as_it_was(recipe: Path) -> None:
    def files() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in Path("deep").rglob("*") if path.is_file()}

    refuse = "echo 'sbatch: error: invalid partition specified: nowhere' >&2; exit 1"
    program(recipe, "sbatch", refuse)
    flags = {"on": "slurm", "ranks_per_node": 1}
    with pytest.raises(UserError, match=r"sbatch refused the job .*\n.*invalid partition"):
        run(str(recipe), **flags, overrides=["run.dir=deep/run"])  # type: ignore[arg-type]
    assert not Path("deep").exists()
    keep_scripts(recipe)
    assert run(str(recipe), **flags, overrides=["run.dir=deep/run"]) == 0  # type: ignore[arg-type]
    before = files()
    assert len(before) == 5
    program(recipe, "sbatch", refuse)
    with pytest.raises(UserError, match="sbatch refused"):
        run(str(recipe), **flags, overrides=["run.dir=deep/run", "optimizer.lr=5e-4"])  # type: ignore[arg-type]
    assert files() == before
