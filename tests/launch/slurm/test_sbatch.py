"""The options of the sbatch script as sbatch reads them; test_script.py has what the script does."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
import subprocess

import pytest

from data_pipeline.errors import UserError
from launch.job import Job, StageJob
from launch.slurm.sbatch import render

JOB = Job(
    recipe="configs/flip/laion.yaml",
    run_dir="runs/flip",
    name="flip",
    stages=(StageJob("masked", "train", 500), StageJob("mix", "merge")),
    on="slurm",
    nodes=2,
    ranks_per_node=4,
    gpus_per_node=4,
    python="/opt/dromos/bin/python",
    workdir="/scratch/me",
    recipe_id="0123456789ab",
    env={"NCCL_SOCKET_IFNAME": "ib0"},
    cluster={
        "kind": "slurm",
        "partition": "gpu",
        "account": "vision",
        "time": "24:00:00",
        "gpus_per_node": 4,
        "cpus_per_rank": 12,
        "signal_lead": 600,
        "extra": {"exclusive": True, "mem": 0, "open-mode": "truncate"},
        "setup": ["module load cuda"],
    },
)


def replace(job: Job, **values: object) -> Job:
    return dataclasses.replace(job, **values)  # type: ignore[arg-type]


def options(job: Job) -> dict[str, str | None]:
    """The script's options as sbatch reads them: words of the #SBATCH lines above the first command."""
    script = render(job)
    assert subprocess.run(["bash", "-n", "-c", script], capture_output=True).returncode == 0
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    head = list(itertools.takewhile(lambda line: line.startswith("#") or not line, lines))
    found: dict[str, str | None] = {}
    for line in head:
        if line.startswith("#SBATCH"):
            (word,) = shlex.split(line.removeprefix("#SBATCH "), comments=True)
            name, equals, value = word.removeprefix("--").partition("=")
            assert name not in found
            found[name] = value if equals else None
    assert "#SBATCH" not in script.replace("\n".join(head), "")
    return found


def test_the_options_are_those_of_the_job_and_its_cluster_file() -> None:
    assert options(JOB) == {
        "job-name": "flip",
        "partition": "gpu",
        "account": "vision",
        "time": "24:00:00",
        "nodes": "2",
        "ntasks-per-node": "4",
        "cpus-per-task": "12",
        "gres": "gpu:4",
        "chdir": "/scratch/me",
        "output": "/scratch/me/runs/flip/slurm-%j.log",
        "open-mode": "truncate",
        "signal": "B:USR1@600",
        "requeue": None,
        "exclusive": None,
        "mem": "0",
    }


def test_options_of_a_small_job() -> None:
    """Also `extra`: it replaces an option, adds one, and removes one."""
    extra = {"signal": False, "output": "/tmp/a b #1.log", "constraint": "a100|h100", "mem": 0}
    cluster = {"kind": "slurm", "qos": "short", "requeue": False, "extra": extra}
    job = replace(JOB, gpus_per_node=0, nodes=1, ranks_per_node=1, name="two words", cluster=cluster)
    assert options(job) == {
        "job-name": "two words",
        "qos": "short",
        "nodes": "1",
        "ntasks-per-node": "1",
        "cpus-per-task": "1",
        "chdir": "/scratch/me",
        "output": "/tmp/a b #1.log",
        "open-mode": "append",
        "no-requeue": None,
        "constraint": "a100|h100",
        "mem": "0",
    }
    assert options(replace(job, cluster={"kind": "slurm"}))["signal"] == "B:USR1@300"
    hostile = replace(JOB, workdir="/w/a b", run_dir="runs/100%j", cluster={"kind": "slurm"})
    assert options(hostile)["chdir"] == "/w/a b"
    assert options(hostile)["output"] == "/w/a b/runs/100%%j/slurm-%j.log"


def test_the_script_says_what_each_stage_is() -> None:
    lines = render(JOB).splitlines()
    assert "# masked: training, 2 x 4 ranks" in lines
    assert "# mix: merge, one process" in lines


def test_equal_jobs_render_equal_scripts() -> None:
    assert render(Job.from_json(JOB.to_json())) == render(JOB)


def test_sbatch_options_that_cannot_be_quoted_are_refused() -> None:
    with pytest.raises(UserError, match="--job-name="):
        render(replace(JOB, name='fl"ip'))
    with pytest.raises(UserError, match="--comment="):
        render(replace(JOB, cluster={"kind": "slurm", "extra": {"comment": "a\nb"}}))
    for value in ("a\\b", "a'b"):
        with pytest.raises(UserError, match="cannot contain quotes, backslashes or line breaks"):
            render(replace(JOB, workdir=value))
