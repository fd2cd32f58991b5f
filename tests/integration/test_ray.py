"""The Ray backend on a cluster of two nodes: the FLIP demo by the job API, stopped, resumed, and with a killed rank."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import STEPS, Demo
from tests.integration.ray_cluster import RayCluster
from tests.support.reference_runs import Cases, Job, check_metrics, check_weights

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    pytest.importorskip("ray", reason="needs Ray: pip install 'dromos[ray]'")
    with RayCluster() as cluster:
        yield cluster


def wait_until(true: Callable[[], object], seconds: float, explain: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.2)


def rank_process(rank: int, run: str) -> int | None:
    """The process of a rank: `dromos train` of this run with RANK=rank."""
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            if b"launch.cli\0train" not in command or f"runs/{run}/".encode() not in command:
                continue
            if f"\0RANK={rank}\0".encode() in b"\0" + (entry / "environ").read_bytes():
                return int(entry.name)
        except OSError:
            continue
    return None


def test_two_nodes_through_a_stop_equal_local(
    demo: Demo, local: list[dict[str, Any]], cluster: RayCluster
) -> None:
    """Ray actors build batches until the job is stopped; it resumes with local workers, with equal metrics."""
    flags = ("--on", "ray", "--nodes", "2", "--cluster", str(cluster.file))
    code, output = demo.run("ray", *flags, "loader.backend=ray", env=cluster.env)
    assert code == 0, output
    job = re.findall(r"submitted job (\S+)", output)[0]

    def logs() -> str:
        return f"{cluster.ray('job', 'logs', job).stdout}\n{demo.logs('ray')}"

    wait_until(lambda: demo.steps("ray") >= 5, 240, logs)
    cluster.stop_job(job)
    wait_until(lambda: cluster.job_state(job) == "STOPPED", 120, logs)
    stopped = demo.steps("ray")
    assert 5 <= stopped < STEPS
    assert (demo.stage("ray") / "checkpoints" / f"step_{stopped:08d}" / "COMPLETE").exists(), logs()
    code, output = demo.run("ray", *flags, "--wait", env=cluster.env)
    assert code == 0, output + demo.logs("ray")
    assert "succeeded" in output
    assert "resumes after step" in (demo.stage("ray") / "logs" / "rank_0.log").read_text()
    assert demo.rows("ray") == local


def test_a_run_on_ray_equals_the_reference(
    cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, weights and replaced samples are those of a second trainer (tests/support/reference).

    Two ranks have batches of 7, 1 and 11 rows, so that one has dummy rows, or nothing else.
    """
    for name, value in (cluster.env | {"RAY_ADDRESS": f"127.0.0.1:{cluster.gcs}"}).items():
        monkeypatch.setenv(name, value)
    cases = Cases(tmp_path)
    job = Job("uneven_flip", 2, 1, workers=2, backend="ray")
    check_metrics(cases, job)
    check_weights(cases, job)


def test_a_killed_rank_is_named_and_fails_the_job(demo: Demo, cluster: RayCluster) -> None:
    flags = ("--on", "ray", "--nodes", "2", "--cluster", str(cluster.file), "--wait")
    process = demo.start(demo.command("killed", *flags), cluster.env)
    wait_until(lambda: demo.steps("killed") >= 1, 240, lambda: demo.logs("killed"))
    victim, other = rank_process(1, "killed"), rank_process(0, "killed")
    assert victim
    assert other
    os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert "rank 1 of 2 ended with SIGKILL" in output
    assert "failed" in output
    wait_until(lambda: not Path(f"/proc/{other}").exists(), 20, lambda: "rank 0 outlived its job")


def test_a_local_job_with_no_cluster_named_has_a_ray_of_its_own(
    demo: Demo, local: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = {path.name for path in Path(tempfile.gettempdir()).glob("dromos-ray-*")}
    code, output = demo.run("own-ray", "--ranks-per-node", "2", "loader.backend=ray")
    assert code == 0, output + demo.logs("own-ray")
    assert demo.rows("own-ray") == local
    assert {path.name for path in Path(tempfile.gettempdir()).glob("dromos-ray-*")} == before


def test_a_job_that_does_not_fit_says_what_it_waits_for(
    demo: Demo, cluster: RayCluster, tmp_path: Path
) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(f"kind: ray\naddress: {cluster.address}\nstart_seconds: 3\n")
    flags = ("--on", "ray", "--nodes", "4", "--cluster", str(path), "--wait")
    code, output = demo.run("misfit", *flags, env=cluster.env)
    assert code == 2, output
    assert "4 node(s) with 1 CPU each were not free within 3 s; the cluster has 1 CPU; 1 CPU" in output
