"""A Ray node as a child process: its command as Ray's own parser reads it, and its end, with a stand-in for Ray."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import UserError
from launch.job import Job
from launch.ray import local_head, process
from tests.support.launching import ROOT, alive, measured, wait_for

pytest.importorskip("ray")

# Does what RAY_DOES says: `run` until stopped, `linger` (ignores SIGTERM and leaves a child), or `fail`.
RAY = """
import json, os, signal, subprocess, sys, time
does, folder = os.environ["RAY_DOES"], os.environ["RAY_CALLS"]
child = subprocess.Popen(["sleep", "1000"]) if does != "fail" else None
call = {"argv": sys.argv[1:], "env": dict(os.environ), "pids": [os.getpid(), child.pid if child else 0]}
if does == "linger":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(os.path.join(folder, "call.tmp"), "w") as file:
    json.dump(call, file)
os.rename(file.name, os.path.join(folder, "call.json"))
if does == "fail":
    sys.exit("no memory for the object store")
print("Ray runtime started.", flush=True)
if does == "crash":
    time.sleep(0.3)
    sys.exit("the raylet died")
while True:
    signal.pause()
"""


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment in which a process runs the stand-in in place of Ray."""
    package = tmp_path / "fake" / "ray" / "scripts"
    package.mkdir(parents=True)
    for path in (package.parent / "__init__.py", package / "__init__.py"):
        path.write_text("")
    (package / "scripts.py").write_text(RAY)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(local_head.tempfile, "tempdir", str(tmp_path / "tmp"))
    fake = {"PYTHONPATH": f"{tmp_path / 'fake'}:{ROOT}", "RAY_CALLS": str(tmp_path), "RAY_DOES": "run"}
    return {"PATH": os.environ["PATH"], **measured(), **fake}


def call(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "call.json"
    wait_for(path.exists, "Ray to be started")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def wait_for_end(made: dict[str, Any]) -> None:
    wait_for(lambda: not any(map(alive, made["pids"])), "the processes of Ray to end")


def options(argv: list[str]) -> dict[str, Any]:
    """The options of `ray start` as Ray's own command line reads them."""
    from ray.scripts import scripts

    assert argv[0] == "start"
    parsed: dict[str, Any] = scripts.start.make_context("start", list(argv[1:])).params
    return parsed


def words(*arguments: Any) -> list[str]:
    command = process.start_command(*arguments)
    assert command[:4] == [sys.executable, "-P", "-m", "ray.scripts.scripts"]
    return command[4:]


def test_a_head_and_a_joining_node_as_ray_reads_their_commands(tmp_path: Path) -> None:
    head = options(words(tmp_path, 3, "127.0.0.1", None, 6379))
    joined = options(words(tmp_path, 5, "127.0.0.2", "127.0.0.1:6379"))
    assert (head["head"], head["port"], head["address"]) == (True, 6379, None)
    assert (joined["head"], joined["port"], joined["address"]) == (False, None, "127.0.0.1:6379")
    assert head["include_dashboard"] is False
    assert (head["node_ip_address"], joined["node_ip_address"]) == ("127.0.0.1", "127.0.0.2")
    ports = ["dashboard_agent_listen_port", "dashboard_agent_grpc_port", "runtime_env_agent_port"]
    ports.append("metrics_export_port")
    for node, cpus, own in (
        (head, 3, [*ports, "ray_client_server_port", "dashboard_port"]),
        (joined, 5, ports),
    ):
        assert node["block"] is True  # else `ray start` ends at once and leaves its processes
        assert node["disable_usage_stats"] is True
        assert (node["num_cpus"], node["num_gpus"]) == (cpus, 0)  # the GPUs are the ranks'
        assert (node["min_worker_port"], node["max_worker_port"]) == (0, 0)
        assert node["temp_dir"] == str(tmp_path / "s")
        assert 128 << 20 <= node["object_store_memory"] <= 1 << 30
        chosen = [int(node[name]) for name in own]
        assert len(set(chosen)) == len(chosen)
        assert all(1024 <= port < 65536 for port in chosen)


@pytest.mark.parametrize(
    ("free", "size"),
    [(1 << 40, 1 << 30), (1 << 30, 1 << 29), (0, 128 << 20), (300 << 20, 150 << 20), (None, 128 << 20)],
)
def test_the_object_store_takes_half_of_the_free_shared_memory_between_limits(
    monkeypatch: pytest.MonkeyPatch, free: int | None, size: int
) -> None:
    def disk_usage(path: str) -> Any:
        assert path == "/dev/shm"
        if free is None:
            raise FileNotFoundError(path)
        return shutil._ntuple_diskusage(free, 0, free)  # type: ignore[attr-defined]

    monkeypatch.setattr(process.shutil, "disk_usage", disk_usage)
    assert process.object_store_bytes() == size


def test_a_token_is_new_secret_and_never_overwritten(tmp_path: Path) -> None:
    tokens = [process.write_token(tmp_path / name).read_text() for name in "ab"]
    assert tokens[0] != tokens[1]
    assert all(len(bytes.fromhex(token)) >= 16 for token in tokens)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        process.write_token(tmp_path / "a")


JOB = Job("r.yaml", "runs/x", ())


@pytest.mark.parametrize("does", ["run", "linger"])
def test_the_jobs_ray_lives_as_long_as_the_block(
    environ: dict[str, str], tmp_path: Path, does: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if does == "linger":
        environ["RAY_DOES"] = "linger"
        patched = tmp_path / "fake" / "sitecustomize.py"  # 20 s in reality
        patched.write_text("from launch.ray import process\nprocess.STOP_SECONDS = 0.1\n")
    with local_head.ray_for_job(JOB, environ) as env:
        made = call(tmp_path)
        assert all(map(alive, made["pids"]))
        head = options(made["argv"])
        assert env["RAY_ADDRESS"] == f"127.0.0.1:{head['port']}"
        assert (head["head"], head["node_ip_address"]) == (True, "127.0.0.1")
        assert head["num_cpus"] == len(os.sched_getaffinity(0))
        token = Path(env["RAY_AUTH_TOKEN_PATH"])
        assert token.stat().st_mode & 0o777 == 0o600
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
            assert made["env"][name] == env[name]
        assert env["RAY_AUTH_MODE"] == "token"
        assert made["env"]["RAY_USAGE_STATS_ENABLED"] == "0"
    wait_for_end(made)
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("address", ["cluster", "environment", "both"])
def test_a_named_cluster_is_used_and_none_started(
    environ: dict[str, str], tmp_path: Path, address: str
) -> None:
    job = Job("r", "x", (), cluster={} if address == "environment" else {"gcs_address": "file:6379"})
    given = environ if address == "cluster" else environ | {"RAY_ADDRESS": "variable:6379"}
    with local_head.ray_for_job(job, given) as env:
        assert env == {"RAY_ADDRESS": "variable:6379" if address == "environment" else "file:6379"}
    assert not (tmp_path / "call.json").exists()


def test_a_ray_that_does_not_start_is_told_with_its_output(environ: dict[str, str], tmp_path: Path) -> None:
    environ["RAY_DOES"] = "fail"
    with (
        pytest.raises(
            RuntimeError, match=r"(?s)Ray ended at its start.*no memory for the object store"
        ) as told,
        local_head.ray_for_job(JOB, environ),
    ):
        pytest.fail("the block ran without Ray")
    assert (
        str(told.value).split("\n")[1].startswith("dromos: ")
    )  # all of the output, from its first character
    assert list((tmp_path / "tmp").iterdir()) == []


def test_an_error_in_the_block_ends_ray_too(environ: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(KeyError), local_head.ray_for_job(JOB, environ):
        raise KeyError
    wait_for_end(call(tmp_path))
    assert list((tmp_path / "tmp").iterdir()) == []


def test_without_ray_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_head.importlib.util, "find_spec", lambda name: None)
    with (
        pytest.raises(UserError, match=r"needs Ray; install it with: pip install 'dromos\[ray\]'"),
        local_head.ray_for_job(JOB, {}),
    ):
        pytest.fail("the block ran without Ray")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, None])
def test_a_supervised_node_ends_on_a_signal_and_is_told_when_it_ends_itself(
    environ: dict[str, str], tmp_path: Path, sent: signal.Signals | None
) -> None:
    """Slurm's srun forwards SIGUSR1, the launcher sends SIGTERM; without either, Ray's end is a failure."""
    folder = tmp_path / "node"
    folder.mkdir()
    command = [sys.executable, "-P", "-m", "launch.ray.local_head", str(folder)]
    ray = process.start_command(folder, 1, "127.0.0.1", None, 6379)
    node = subprocess.Popen(
        [*command, *ray],
        env=environ | {"RAY_DOES": "run" if sent else "crash"},
        stdout=subprocess.PIPE,
        text=True,
    )
    made = call(tmp_path)
    if sent:
        wait_for((folder / "up").exists, "Ray to be up")
        node.send_signal(sent)
    output, _ = node.communicate(timeout=60)
    assert node.returncode == (0 if sent else 1)
    assert ("Ray ended without a stop request" in output) == ("the raylet died" in output) == (sent is None)
    wait_for_end(made)
    assert not folder.exists()
