"""The sbatch script: golden text, quoting, options, and its behaviour in bash."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from launch.job import Job, StageJob
from launch.slurm import job_step
from launch.slurm.sbatch import render, without_job_variables

GOLDEN = Path(__file__).parent / "golden"
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
    import dataclasses

    return dataclasses.replace(job, **values)  # type: ignore[arg-type]


def test_golden_script() -> None:
    """After an intended change: DROMOS_GOLDEN=write pytest tests/launch/slurm/test_sbatch.py, and read the diff."""
    path = GOLDEN / "flip.sbatch"
    if os.environ.get("DROMOS_GOLDEN") == "write":
        path.write_text(render(JOB))
    assert render(JOB) == path.read_text()


def test_equal_jobs_render_equal_scripts() -> None:
    assert render(Job.from_json(JOB.to_json())) == render(JOB)


def test_no_gpus_no_gres() -> None:
    cpu = replace(JOB, gpus_per_node=0, cluster={"kind": "slurm"}, ranks_per_node=1)
    script = render(cpu)
    assert "gres" not in script
    assert "gpu" not in script
    assert "export DS_ACCELERATOR=cpu" in script
    assert "--gres=gpu:4" in render(JOB)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_whatever_stands_in_a_name_reaches_the_rank_as_it_is(tmp_path: Path) -> None:
    """Run the script with an srun that records its arguments."""
    hostile = "a b'c\"d$(touch pwned)`e`;f&g"
    workdir = tmp_path / "w"
    workdir.mkdir()
    (workdir / "srun").write_text('#!/bin/sh\nfor a in "$@"; do printf "%s\\n" "$a"; done >> arguments\n')
    (workdir / "python").write_text(
        '#!/bin/sh\ncase "$*" in *rendezvous*) echo 127.0.0.1 29400;; *) echo todo;; esac\n'
    )
    for name in ("srun", "python"):
        (workdir / name).chmod(0o755)
    job = replace(
        JOB,
        workdir=str(workdir),
        python=str(workdir / "python"),
        run_dir=f"runs/{hostile}".replace("/", "/"),
        stages=(StageJob("masked", "train", 5),),
        env={"WORDS": hostile},
        cluster={"kind": "slurm", "extra": {"output": "out"}},
    )
    env = {"PATH": f"{workdir}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n0", "SLURM_JOB_ID": "1"}
    done = subprocess.run(["bash", "-c", render(job)], cwd=workdir, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    arguments = (workdir / "arguments").read_text().splitlines()
    assert f"runs/{hostile}/recipe-0123456789ab.yaml" in arguments
    assert f"--output={workdir}/runs/{hostile}/masked/logs/rank_%t.log" in arguments
    assert not list(tmp_path.rglob("pwned"))


def test_a_loader_on_ray_gets_a_ray_of_the_job() -> None:
    assert "ray" not in render(JOB)
    script = render(replace(JOB, stages=(StageJob("masked", "train", 5, "ray"),)))
    assert "srun --overlap --nodes=2 --ntasks=2" in script
    assert 'if [ -z "${RAY_ADDRESS:-}" ]; then' in script
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0


def test_sbatch_options_that_cannot_be_quoted_are_refused() -> None:
    with pytest.raises(UserError, match="--job-name="):
        render(replace(JOB, name='fl"ip'))
    with pytest.raises(UserError, match="--comment="):
        render(replace(JOB, cluster={"kind": "slurm", "extra": {"comment": "a\nb"}}))
    assert '#SBATCH --job-name="two words"' in render(replace(JOB, name="two words"))
    assert "%%a/slurm-%j.log" in render(replace(JOB, run_dir="runs/%a"))


@pytest.mark.parametrize(
    ("exit_code", "heard", "state", "ends_with", "queued"),
    [
        (0, False, "R", 0, False),
        (1, False, "R", 1, False),
        (137, False, "R", 1, False),
        (2, False, "R", 2, False),
        (75, False, "R", 75, True),
        (75, False, "CG", 75, False),  # cancelled: the job is completing
        (138, True, "R", 75, True),  # a rank that had not started dies of the signal
    ],
)
def test_what_a_stage_ends_with_decides_what_the_job_does(
    tmp_path: Path, exit_code: int, heard: bool, state: str, ends_with: int, queued: bool
) -> None:
    programs = {
        "srun": f"{'kill -USR1 $PPID; sleep 0.2; ' if heard else ''}exit {exit_code}",
        "python": 'case "$*" in *rendezvous*) echo 127.0.0.1 29400;; *) echo todo;; esac',
        "squeue": f"echo {state}",
        "scontrol": "echo $* >> scontrol.log",
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    stages = (StageJob("masked", "train", 5),)
    job = replace(JOB, workdir=str(tmp_path), python="python", stages=stages, cluster={"kind": "slurm"})
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n0", "SLURM_JOB_ID": "7"}
    script = tmp_path / "job.sbatch"
    script.write_text(render(job))
    done = subprocess.run(["bash", str(script)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == ends_with, done.stderr
    log = tmp_path / "scontrol.log"
    assert (log.read_text().strip() if log.exists() else "") == ("requeue 7" if queued else "")


def test_environment_of_a_task() -> None:
    task = {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "7",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
        "SLURM_CPUS_PER_TASK": "12",
    }
    assert job_step.rank_env(task) == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "12",
    }
    assert "OMP_NUM_THREADS" not in job_step.rank_env({**task, "OMP_NUM_THREADS": "3"})


def test_rendezvous() -> None:
    shown = "NodeName=n0 Arch=x86_64\n   NodeAddr=10.1.2.3 NodeHostName=vm Port=6818\n"
    assert job_step.parse_node_address(shown) == "10.1.2.3"
    assert job_step.ports(11) == job_step.ports(11)
    assert job_step.ports(11)[0] != job_step.ports(12)[0]
    assert all(20000 <= port < 40000 for port in job_step.ports(123456789))
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        assert job_step.first_free([port, 0]) == 0


def test_a_job_submitted_from_inside_a_job_does_not_inherit_it() -> None:
    inside = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SBATCH_PARTITION": "p", "HOME": "/h"}
    assert without_job_variables(inside) == {"HOME": "/h"}
    assert without_job_variables({"SBATCH_ACCOUNT": "a"}) == {
        "SBATCH_ACCOUNT": "a"
    }  # outside a job, the user's defaults stay
