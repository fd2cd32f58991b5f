"""Checks before anything is written: data, weights, and the working directory that their paths start from."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from launch import data_check, preflight
from launch.run import make_job, run
from pretrain.recipe.dump import dump_plain, stage_record
from pretrain.recipe.load import load_recipe
from tests.support.launching import picture, write_recipe, write_tar

ZERO_SHOT = """
eval:
  zero_shot:
    digits: {path: HELD_OUT, classes: {"0": zero}, templates: ["{}"]}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def finish(recipe: Path, *stages: str) -> None:
    """Write the files that a run leaves for finished stages."""
    loaded = load_recipe(recipe)
    for name in stages:
        stage = recipe.parent / "run" / name
        stage.mkdir(parents=True)
        (stage / "resolved.yaml").write_text(dump_plain(stage_record(loaded, name)))
        (stage / "result.json").write_text('{"step": 20}')


def test_tars_without_pictures_are_one_message_and_nothing_is_written(recipe: Path) -> None:
    write_tar(recipe.parent / "data" / "00000.tar", {"txt": b"a grey square"})
    command = [sys.executable, "-m", "launch.cli", "run", str(recipe), "--ranks-per-node", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=recipe.parent)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"dromos: {recipe}: stage masked: data.pairs.sources.digits: all 8 samples")
    assert "missing image" in done.stderr
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize("on", ["local", "slurm"])
def test_contents_are_looked_at_without_what_decodes_only_on_a_cluster(
    recipe: Path, on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that only submits may lack the packages that decode."""
    write_tar(recipe.parent / "data" / "00000.tar", {"png": picture()})
    loaded = load_recipe(recipe)
    job = make_job(loaded, str(recipe), on=on, ranks_per_node=1)
    with pytest.raises(UserError, match="missing caption"):
        preflight.check(loaded, job)
    monkeypatch.setattr(data_check, "DECODERS", ("a_package_that_is_not_there",))
    if on == "slurm":
        preflight.check(loaded, job)
    else:
        with pytest.raises(UserError, match="missing caption"):
            preflight.check(loaded, job)


def test_object_stores_are_left_to_the_ranks_of_a_cluster(recipe: Path) -> None:
    text = recipe.read_text().replace(
        "{digits: ", "{far: {path: 's3://no-such-bucket/{0..1}.tar', weight: 1}, near: {weight: 2, path: "
    )
    recipe.write_text(text.replace("data}", "data}}"))
    loaded = load_recipe(recipe)
    job = make_job(loaded, str(recipe), on="slurm", ranks_per_node=1)
    preflight.check(loaded, job)
    write_tar(recipe.parent / "data" / "00000.tar", {"txt": b"a grey square"})
    with pytest.raises(UserError, match=r"data\.pairs\.sources\.near: all 8 samples"):
        preflight.check(loaded, job)


def test_a_folder_without_tars_is_named(recipe: Path) -> None:
    (recipe.parent / "data" / "00000.tar").unlink()
    recipe.write_text("prepare: demo\n" + recipe.read_text())
    with pytest.raises(UserError, match=r"data\.pairs\.sources\.digits: .*data") as told:
        run(str(recipe), ranks_per_node=1)
    assert "dromos data prepare" not in str(told.value)  # which does not make this folder
    assert not (recipe.parent / "run").exists()


def test_the_command_that_makes_the_demo_data_is_told(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parent)
    text = recipe.read_text().replace(str(recipe.parent / "data"), "data/demo/digits/train")
    recipe.write_text("prepare: demo\n" + text)
    with pytest.raises(UserError, match=f"make it with: dromos data prepare {recipe}"):
        run(str(recipe), ranks_per_node=1)


def test_what_is_prepared_lies_where_prepare_writes() -> None:
    from launch.demo.data import DEFAULT_ROOT

    assert Path(data_check.PREPARED) == DEFAULT_ROOT


def test_held_out_data_must_be_there(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + ZERO_SHOT.replace("HELD_OUT", str(recipe.parent / "held-out")))
    with pytest.raises(UserError, match=r"stage masked: eval\.zero_shot\.digits\.path: .*held-out"):
        run(str(recipe), ranks_per_node=1)
    assert not (recipe.parent / "run").exists()


def test_a_finished_run_needs_no_data(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(recipe, "masked", "tuned")
    shutil.rmtree(recipe.parent / "data")
    assert run(str(recipe), ranks_per_node=1) == 0
    assert "tuned: done" in capsys.readouterr().out


def test_the_command_for_a_missing_predecessor_makes_it(recipe: Path) -> None:
    """The command includes this job's flags, and its output is the predecessor that the stage reads."""
    folder = recipe.parent / "other place"
    overrides = [f"run.dir={folder}", "tuned.optimizer.lr=1e-4", "optimizer.betas=[0.9,0.99]"]
    with pytest.raises(UserError, match="stage tuned: init: ") as told:
        run(str(recipe), ranks_per_node=2, stages=["tuned"], overrides=overrides)
    offered = shlex.split(str(told.value).partition("it is a stage, run: ")[2])
    kept = [overrides[0], overrides[2]]
    assert offered == ["dromos", "run", str(recipe), "--stage", "masked", "--ranks-per-node", "2", *kept]
    made = load_recipe(recipe, kept, "masked", strict=True)
    (folder / "masked").mkdir(parents=True)
    (folder / "masked" / "resolved.yaml").write_text(dump_plain(stage_record(made, "masked")))
    (folder / "masked" / "result.json").write_text('{"step": 20}')
    checkpoint = folder / "masked" / "checkpoints" / "step_00000020"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE").touch()
    loaded = load_recipe(recipe, overrides, "tuned", strict=True)
    preflight.check(
        loaded, make_job(loaded, str(recipe), stages=["tuned"], ranks_per_node=2, overrides=overrides)
    )


def test_everything_is_sought_from_the_working_directory_of_the_job(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir, here = tmp_path / "work", tmp_path / "here"
    here.mkdir()
    recipe.write_text(recipe.read_text().replace(f"{tmp_path}/", ""))  # data and run, relative
    workdir.mkdir()
    shutil.move(tmp_path / "data", workdir / "data")
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(f"kind: slurm\nworkdir: {workdir}\n")
    monkeypatch.chdir(here)
    loaded = load_recipe(recipe)
    job = make_job(loaded, str(recipe), on="slurm", ranks_per_node=1, cluster_file=str(cluster))
    preflight.check(loaded, job)
    assert Path.cwd() == here
    job = make_job(loaded, str(recipe), on="slurm", ranks_per_node=1)
    with pytest.raises(UserError, match=r"data\.pairs\.sources\.digits"):
        preflight.check(loaded, job)
    cluster.write_text(f"kind: slurm\nworkdir: {tmp_path}/nowhere\n")
    job = make_job(loaded, str(recipe), on="slurm", ranks_per_node=1, cluster_file=str(cluster))
    with pytest.raises(UserError, match=r"cluster\.yaml: workdir: .*nowhere is not a folder on this machine"):
        preflight.check(loaded, job)


def test_a_local_job_runs_here_whatever_its_ray_cluster_is_like(recipe: Path, tmp_path: Path) -> None:
    cluster = tmp_path / "ray.yaml"
    cluster.write_text("kind: ray\nworkdir: /elsewhere\npython: /elsewhere/python\n")
    job = make_job(load_recipe(recipe), str(recipe), ranks_per_node=1, cluster_file=str(cluster))
    assert (job.workdir, job.python) == (str(Path.cwd()), sys.executable)


def test_looking_at_contents_imports_nothing_heavy(recipe: Path) -> None:
    code = (
        "import sys; from launch import preflight; from launch.run import make_job\n"
        "from pretrain.recipe.load import load_recipe\n"
        f"path = {str(recipe)!r}; loaded = load_recipe(path)\n"
        "preflight.check(loaded, make_job(loaded, path, ranks_per_node=1))\n"
        "print([name for name in ('torch', 'ray', 'deepspeed', 'open_clip') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
