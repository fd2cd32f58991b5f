"""A launch.py, pretrain.py, data_pipeline.py or ray.py in the user's folder is never imported in place of a package,
and the packages launch.ray and launch.slurm never shadow an installed package.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from launch.job import Job, StageJob
from launch.ray.process import start_command
from launch.ray.submit import submission
from launch.slurm.sbatch import render
from launch.supervise.guard import guarded
from pretrain.recipe.dump import dump
from pretrain.recipe.load import load_recipe
from tests.support.launching import write_recipe

JOB = Job("r.yaml", "runs/x", (StageJob("masked", "train", 5, "ray"), StageJob("mix", "merge")), on="slurm")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with files that have the names of our packages."""
    for name in ("launch", "pretrain", "data_pipeline", "ray"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the user\\'s own file was run')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path


def output(command: list[str]) -> tuple[int, str]:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_guarded_commands(folder: Path) -> None:
    assert output(guarded(["echo", "ours"])) == (0, "ours\n")


@pytest.mark.parametrize("on", ["local", "slurm"])
def test_the_command_of_a_rank(folder: Path, on: str) -> None:
    job = Job("nowhere.yaml", "runs/x", (), python=sys.executable, on=on)  # type: ignore[arg-type]
    command = job.train_command("masked")
    light = [*command[: command.index("train")], "recipe", "show", "nowhere.yaml"]
    code, said = output(light)
    assert code == 2
    assert said.startswith("dromos: ")
    assert "no such recipe" in said


def test_the_command_of_ray(folder: Path) -> None:
    pytest.importorskip("ray")
    command = start_command(folder, 1, "127.0.0.1", None)
    code, said = output([*command[: command.index("start")], "--version"])
    assert code == 0
    assert "version" in said


def test_the_whole_script_of_a_slurm_job(folder: Path) -> None:
    """Bash runs the script, with a failing scontrol: it stops after the first stage, which is done."""
    recipe = load_recipe(write_recipe(folder))
    (folder / "run").mkdir()
    (folder / "run" / "recipe.yaml").write_text(dump(recipe))
    (folder / "run" / "masked").mkdir()
    (folder / "run" / "masked" / "result.json").write_text('{"step": 20}')
    (folder / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    (folder / "scontrol").chmod(0o755)
    stages = (StageJob("masked", "train", 20), StageJob("tuned", "train", 10))
    job = Job("r.yaml", "run", stages, on="slurm", python=sys.executable, cluster={"kind": "slurm"})
    env = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "n0",
        "SLURM_JOB_ID": "7",
    }
    done = subprocess.run(["bash", "-c", render(job)], env=env, capture_output=True, text=True)
    assert "masked: done" in done.stdout, done.stderr  # printed by our launch.slurm.job_step
    assert "the user's own file" not in done.stdout + done.stderr
    assert "CalledProcessError" in done.stderr


def test_every_module_of_ours_that_a_cluster_runs_has_the_flag() -> None:
    script = render(Job.from_json(JOB.to_json().replace('"cluster": {}', '"cluster": {"kind": "slurm"}')))
    entry = submission(Job("r.yaml", "runs/x", (), on="ray", cluster={"kind": "ray"}), "")["entrypoint"]
    modules = re.findall(r"(\S+) -m ([a-z_.]+)", script + entry)
    assert {name for _, name in modules} >= {
        "launch.slurm.job_step",
        "launch.slurm.ray_node",
        "launch.cli",
    }
    assert {before for before, _ in modules} == {"-P"}


@pytest.mark.parametrize("module", ["launch.ray.driver", "launch.cli.__main__", "launch.slurm.ray_node"])
def test_the_real_ray_is_imported_from_the_folder_of_an_entry_point(module: str) -> None:
    """Ray adds the folder of the driver's script to sys.path of its workers, ahead of site-packages."""
    pytest.importorskip("ray")
    folder = Path(str(find_spec(module).origin)).parent  # type: ignore[union-attr]
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); import ray, {module}; print(ray.remote.__module__)"
    )
    exit_code, printed = output([sys.executable, "-P", "-c", code])
    assert exit_code == 0, printed
    assert printed.strip().startswith("ray.")
    names = {path.stem for path in folder.iterdir()}
    assert not names & {"ray", "slurm", *sys.stdlib_module_names}
