"""The Slurm backend on two real slurmd: the FLIP demo across nodes, through a signal and a requeue, and cancelled."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import STEPS, Demo
from tests.integration.slurm_cluster import SlurmCluster, missing_programs

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    if missing := missing_programs():
        pytest.skip(f"Slurm is not installed: no {', '.join(missing)} (apt-get install slurm-wlm munge)")
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture
def cluster_file(tmp_path: Path) -> str:
    path = tmp_path / "cluster.yaml"
    # Both nodes are this machine, whose name may not resolve.
    path.write_text(
        "kind: slurm\ntime: '10'\nsignal_lead: 60\nenv: {GLOO_SOCKET_IFNAME: lo, OMP_NUM_THREADS: '1'}\n"
    )
    return str(path)


def wait_until(true: Callable[[], object], seconds: float, explain: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.2)


def state(slurm: SlurmCluster, job: str) -> str:
    found = re.search(r"JobState=(\w+)", slurm.command("scontrol", "show", "job", job).stdout)
    return found[1] if found else "UNKNOWN"


def submit(demo: Demo, slurm: SlurmCluster, run: str, cluster_file: str, *overrides: str) -> str:
    flags = ("--on", "slurm", "--nodes", "2", "--cluster", cluster_file)
    code, output = demo.run(run, *flags, *overrides, env=slurm.env)
    assert code == 0, output
    job_id = json.loads((demo.stage(run).parent / "job.json").read_text())["job_id"]
    assert f"submitted job {job_id}" in output
    assert f"runs/{run}/slurm-{job_id}.log" in output
    return job_id


def test_two_nodes_through_a_signal_equal_local(
    demo: Demo, local: list[dict[str, Any]], slurm: SlurmCluster, cluster_file: str
) -> None:
    """USR1, as before the time limit: ranks save, the job requeues and resumes, and metrics equal a local run's.

    A Ray cluster of the job, one Ray node per Slurm node, builds the batches.
    """
    before = set(Path(tempfile.gettempdir()).glob("dromos-ray-*"))
    job = submit(demo, slurm, "slurm", cluster_file, "loader.backend=ray")

    def logs() -> str:
        return f"{state(slurm, job)}\n{demo.logs('slurm')}\n{slurm.logs()}"

    wait_until(lambda: demo.steps("slurm") >= 5, 240, logs)
    for on in ("slurm", "local"):  # the job's script holds the lock of the run folder
        code, output = demo.run("slurm", "--on", on, env=slurm.env)
        assert (code, f"is being written by Slurm job {job}, pid " in output) == (2, True), output
    slurm.command("scancel", "--batch", "--signal=USR1", job)
    wait_until(lambda: state(slurm, job) == "PENDING", 60, logs)
    stopped = demo.steps("slurm")
    assert 5 <= stopped < STEPS, logs()
    assert (demo.stage("slurm") / "checkpoints" / f"step_{stopped:08d}" / "COMPLETE").exists()
    # Slurm holds a requeued job for two minutes, so start it now. But wait: slurmd confuses a start within a second
    # of the end with the run that it has just killed.
    time.sleep(3)
    slurm.command("scontrol", "update", f"jobid={job}", "starttime=now")
    wait_until(lambda: state(slurm, job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), 300, logs)
    assert state(slurm, job) == "COMPLETED", logs()
    assert "resumes after step" in (demo.stage("slurm") / "logs" / "rank_0.log").read_text()
    assert demo.rows("slurm") == local
    run = demo.stage("slurm").parent
    assert len(list(run.glob(f"ray-{job}-*.log"))) == 2
    assert not list(run.glob(".ray-*")), "the token of the job's Ray outlived it"
    assert set(Path(tempfile.gettempdir()).glob("dromos-ray-*")) <= before, "Ray's files outlived the job"
    assert (demo.stage("slurm") / "logs" / "rank_1.log").exists()


def test_wait_reports_the_end_and_a_done_stage_is_not_run_again(
    demo: Demo, slurm: SlurmCluster, cluster_file: str
) -> None:
    """Depends on the run above: its stage is done."""
    before = demo.rows("slurm")
    code, output = demo.run(
        "slurm", "--on", "slurm", "--nodes", "2", "--cluster", cluster_file, "--wait", env=slurm.env
    )
    assert code == 0, output
    assert "completed" in output
    job_id = json.loads((demo.stage("slurm").parent / "job.json").read_text())["job_id"]
    assert "masked: done" in (demo.stage("slurm").parent / f"slurm-{job_id}.log").read_text()
    assert demo.rows("slurm") == before


def test_a_cancelled_job_saves_and_is_not_queued_again(
    demo: Demo, local: list[dict[str, Any]], slurm: SlurmCluster, cluster_file: str
) -> None:
    job = submit(demo, slurm, "cancelled", cluster_file)

    def logs() -> str:
        return f"{state(slurm, job)}\n{demo.logs('cancelled')}"

    wait_until(lambda: demo.steps("cancelled") >= 2, 240, logs)
    slurm.command("scancel", job)
    wait_until(lambda: not slurm.command("squeue", "--noheader").stdout.strip(), 60, logs)
    assert state(slurm, job) == "CANCELLED", logs()
    step = demo.steps("cancelled")
    assert step < STEPS
    assert demo.rows("cancelled") == local[:step]
    assert (demo.stage("cancelled") / "checkpoints" / f"step_{step:08d}" / "COMPLETE").exists(), logs()


def test_an_unknown_partition_is_told(demo: Demo, slurm: SlurmCluster, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("kind: slurm\npartition: nowhere\n")
    code, output = demo.run("refused", "--on", "slurm", "--cluster", str(path), env=slurm.env)
    assert code == 2
    assert "sbatch refused the job" in output
    assert "partition" in output
