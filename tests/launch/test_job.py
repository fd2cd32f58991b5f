"""Jobs as data: JSON round trip, defaults, errors before anything is written, and the dry run."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import launch.run
from data_pipeline.errors import UserError
from launch import environment
from launch.cli.app import app
from launch.cluster import load_cluster, parse_cluster
from launch.job import Job, StageJob
from launch.run import make_job, render, run
from pretrain.recipe.load import load_recipe
from tests.support.launching import write_recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def job_of(recipe: Path, *overrides: str, **flags: object) -> Job:
    return make_job(load_recipe(recipe, overrides), str(recipe), overrides=overrides, **flags)  # type: ignore[arg-type]


def test_json_round_trip(recipe: Path) -> None:
    for on, file in (("local", None), ("slurm", "slurm"), ("ray", "ray")):
        cluster = str(ROOT / "configs" / "cluster" / f"{file}.yaml") if file else None
        job = job_of(recipe, "train.steps=7", on=on, cluster_file=cluster)
        assert Job.from_json(job.to_json()) == job


def test_stages_carry_their_length_in_steps(recipe: Path) -> None:
    steps = StageJob("masked", "train", 20), StageJob("tuned", "train", 10)
    assert job_of(recipe).stages == steps
    assert job_of(recipe, stages=["tuned", "masked"]).stages == steps  # the file's order, not the flag's
    recipe.write_text(recipe.read_text().replace("train: {steps: 20}", "train: {samples: 81}"))
    assert job_of(recipe).stages[0].steps == 11  # 81 samples in batches of 8
    recipe.write_text(recipe.read_text().replace("train: {samples: 81}", "train: {epochs: 2}"))
    assert job_of(recipe).stages[0].steps is None  # only the data tells


def test_ranks_default_to_one_a_gpu(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert job_of(recipe).ranks_per_node == 3
    assert job_of(recipe, ranks_per_node=2).ranks_per_node == 2
    with pytest.raises(UserError, match="--ranks-per-node 4: a node has 3 GPUs"):
        job_of(recipe, ranks_per_node=4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert job_of(recipe).ranks_per_node == 1


def test_a_job_is_what_flags_recipe_and_cluster_file_say(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.chdir(tmp_path)
    steps = StageJob("masked", "train", 20), StageJob("tuned", "train", 10)
    values = {"python": "/opt/python", "workdir": "/scratch", "env": {"X": "1"}, "gpus_per_node": 4}
    given = Job(str(recipe), str(tmp_path / "run"), steps, name="small", ranks_per_node=2, gpus_per_node=2,
                python=sys.executable, workdir=str(tmp_path))  # fmt: skip
    assert job_of(recipe) == given  # a rank for each of this machine's GPUs
    for kind in ("slurm", "ray"):
        path = tmp_path / f"{kind}.yaml"
        path.write_text(yaml.safe_dump({"kind": kind, **values}))
        job = job_of(recipe, "train.steps=7", on=kind, nodes=3, cluster_file=str(path))
        assert job.recipe_id is not None
        assert len(job.recipe_id) == 12
        assert job == dataclasses.replace(
            given, stages=(StageJob("masked", "train", 7), StageJob("tuned", "train", 7)), on=kind, nodes=3,
            ranks_per_node=4, overrides=("train.steps=7",), cluster_file=str(path), recipe_id=job.recipe_id,
            cluster=job.cluster, **values,
        )  # fmt: skip
        assert load_cluster(str(path), kind) == parse_cluster(dict(job.cluster))
        other = job_of(recipe, "train.steps=8", on=kind, nodes=3, cluster_file=str(path))
        assert other.recipe_id != job.recipe_id
        with pytest.raises(UserError, match="--ranks-per-node 5: a node has 4 GPUs"):
            job_of(recipe, on=kind, ranks_per_node=5, cluster_file=str(path))
        bare = job_of(recipe, on=kind)
        assert (bare.ranks_per_node, bare.gpus_per_node) == (1, 0)  # not this machine's GPUs
        assert (bare.python, bare.workdir, bare.env) == (sys.executable, str(tmp_path), {})
        assert (bare.cluster["kind"], bare.cluster_file) == (kind, None)
    # A local job uses a cluster file only for its loader's Ray.
    loader = job_of(recipe, cluster_file=str(tmp_path / "ray.yaml"))
    assert (loader.python, loader.workdir, loader.gpus_per_node) == (sys.executable, str(tmp_path), 2)
    assert loader.env == {"X": "1"}


@pytest.mark.parametrize(
    ("flags", "overrides"),
    [
        ({}, ()),
        ({"ranks_per_node": 2, "stages": ["tuned"]}, ("run.name=a b", "optimizer.lr=1e-3")),
        ({"on": "slurm", "nodes": 3, "ranks_per_node": 8, "cluster_file": "slurm"}, ("run.name=$x'y\"",)),
        ({"on": "ray", "nodes": 2, "cluster_file": "ray"}, ("data.pairs.batch=16",)),
    ],
)
def test_the_command_that_goes_on_makes_the_same_job(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], overrides: tuple[str, ...]
) -> None:
    """A shell splits it, the command line reads it, and `dromos run` is called for the same job."""
    if kind := flags.get("cluster_file"):
        flags["cluster_file"] = str(ROOT / "configs" / "cluster" / f"{kind}.yaml")
    job = job_of(recipe, *overrides, **flags)
    jobs: list[Job] = []

    def run_job(path: str, on: str, stages: Any, nodes: Any, ranks: Any, cluster: Any, *rest: Any) -> int:
        jobs.append(make_job(load_recipe(path, rest[1]), path, on, stages, nodes, ranks, cluster, rest[1]))
        return 0

    monkeypatch.setattr(launch.run, "run", run_job)
    shell = ["bash", "-c", f"dromos() {{ printf '%s\\0' \"$@\"; }}; {job.resume_command()}"]
    words = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert jobs == [job]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"on": "moon"}, "--on moon: unknown backend; write one of local, slurm, ray"),
        ({"nodes": 2}, "--nodes 2: several nodes need --on slurm or --on ray"),
        ({"ranks_per_node": 0}, "--ranks-per-node 0: must be at least 1"),
        ({"stages": ["tuned"]}, r"stage tuned: init: .*dromos run .*small.yaml --stage masked"),
        ({"stages": ["tunde"]}, "tuned"),
        ({"cluster_file": "nowhere.yaml", "on": "slurm"}, "--cluster nowhere.yaml: no such file"),
        ({"overrides": ["train.stesp=3"]}, "steps"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(recipe: Path, flags: dict, words: str) -> None:
    before = sorted(recipe.parent.rglob("*"))
    with pytest.raises(UserError, match=words):
        run(str(recipe), **{"ranks_per_node": 1, **flags})
    assert sorted(recipe.parent.rglob("*")) == before


def test_a_folder_of_another_recipe_is_refused(recipe: Path) -> None:
    from pretrain.recipe.dump import dump_plain, stage_record

    loaded = load_recipe(recipe)
    stage = recipe.parent / "run" / "masked"
    stage.mkdir(parents=True)
    (stage / "resolved.yaml").write_text(dump_plain(stage_record(loaded, "masked")))
    (stage / "result.json").write_text('{"step": 20}')
    with pytest.raises(UserError, match=r"optimizer.lr: 0.001 -> 0.002"):
        run(str(recipe), ranks_per_node=1, stages=["masked"], overrides=["optimizer.lr=2e-3"])
    assert run(str(recipe), ranks_per_node=1, stages=["masked"]) == 0  # its own: done


@pytest.mark.parametrize("on", ["local", "slurm", "ray"])
def test_dry_run_prints_what_would_run_and_writes_nothing(
    recipe: Path, on: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(recipe.parent.rglob("*"))
    assert run(str(recipe), on=on, ranks_per_node=2, dry_run=True, overrides=["train.steps=3"]) == 0
    printed = capsys.readouterr().out
    assert printed == render(job_of(recipe, "train.steps=3", on=on, ranks_per_node=2))
    assert "-m launch.cli train" in printed or "-m launch.ray.driver" in printed
    assert sorted(recipe.parent.rglob("*")) == before


@pytest.mark.parametrize("kind", ["slurm", "ray"])
def test_example_cluster_files_are_right(kind: str) -> None:
    assert load_cluster(str(ROOT / "configs" / "cluster" / f"{kind}.yaml"), kind).kind == kind


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "slurm", "partion": "gpu"}, "cluster: unknown key partion; did you mean 'partition'?"),
        ({"kind": "ray", "colour": 1}, "cluster: unknown key colour; known keys: gpus_per_node"),
        ({"kind": "slurm", "gpus_per_node": -1}, "cluster: gpus_per_node: .* greater than or equal to 0"),
        ({"kind": "slurm", "time": 43200}, 'write the time limit in quotes, for example time: "12:00:00"'),
        (
            {"kind": "ray", "env": {"A B": "1"}},
            "cluster: env: .*'A B' is not a valid name of an environment variable",
        ),
        ({"kind": "ray", "env": {"A": True}}, "cluster: env.A: .*string"),
        ({"kind": "slurm", "workdir": "runs"}, "cluster: workdir: .*absolute path"),
        ({"partition": "gpu"}, "kind: None is unknown; write one of slurm, ray"),
    ],
)
def test_a_wrong_cluster_file_is_told(values: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_cluster(values)


def test_numbers_in_the_environment_become_text() -> None:
    env = {"OMP_NUM_THREADS": 1, "_SHARE": 0.5, "NAME": "ib0"}
    expected = {"OMP_NUM_THREADS": "1", "_SHARE": "0.5", "NAME": "ib0"}
    assert parse_cluster({"kind": "slurm", "env": env}).env == expected


def test_a_cluster_file_of_the_other_kind_is_refused() -> None:
    path = str(ROOT / "configs" / "cluster" / "ray.yaml")
    with pytest.raises(UserError, match="describes a ray cluster, but the job runs --on slurm"):
        load_cluster(path, "slurm")


def test_captured_environment_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hush")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    text = json.dumps(environment.capture())
    assert '"OMP_NUM_THREADS": "3"' in text
    assert "hush" not in text
    assert '"torch": "' in text


def test_the_launcher_is_light(recipe: Path) -> None:
    code = (
        "import sys; from launch.run import run; import launch.local, launch.slurm.sbatch\n"
        f"for on in ('local', 'slurm', 'ray'): run({str(recipe)!r}, on=on, ranks_per_node=2, dry_run=True)\n"
        "print([name for name in ('torch', 'ray', 'deepspeed', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"
