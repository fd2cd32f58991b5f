"""A Ray node as a child process: its `ray start` command, its token, and how it and its processes are stopped."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from launch.supervise.guard import guarded
from launch.supervise.rank_process import free_port

MIB = 1 << 20
STOP_SECONDS = 20
STARTED = "Ray runtime started."  # `ray start` prints this when the node is up
PORTS = (
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)
HEAD_PORTS = ("ray-client-server-port", "dashboard-port")


def start_command(folder: Path, cpus: int, host: str, join: str | None, port: int = 0) -> list[str]:
    """`ray start` of a head, or of a node that joins the head at `join`. No well-known ports, no dashboard."""
    options = {
        **({"address": join} if join else {"port": port, "include-dashboard": "false"}),
        **{name: free_port() for name in (PORTS if join else PORTS + HEAD_PORTS)},
        "min-worker-port": 0,  # any free port: the default range is shared by all Ray nodes of a machine
        "max-worker-port": 0,
        "node-ip-address": host,
        "num-cpus": cpus,
        "num-gpus": 0,
        "object-store-memory": object_store_bytes(),
        "temp-dir": folder / "s",
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    head = [] if join else ["--head"]
    return [
        sys.executable,
        "-P",
        "-m",
        "ray.scripts.scripts",
        "start",
        *head,
        "--block",
        "--disable-usage-stats",
        *flags,
    ]


def object_store_bytes() -> int:
    """Size of the object store, which holds a few batches: 1 GiB, or half of the free shared memory if less."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        free = 0
    return max(MIB * 128, min(MIB * 1024, free // 2))


def write_token(path: Path) -> Path:
    """Write a new random token, readable by this user only; returns `path`."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return path


def token_env(path: Path) -> dict[str, str]:
    """Environment in which Ray requires and uses the token."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path), "RAY_USAGE_STATS_ENABLED": "0"}


def supervise(command: list[str], folder: Path, env: dict[str, str], started: Callable[[], None]) -> int:
    """Run `ray start --block` as a child until it ends or this process gets a signal; returns the exit code.

    At the end, kills all processes that Ray started and removes `folder`. `started` is called when the node is up.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: stop.set())
    out = folder / "out"
    try:
        with open(out, "wb") as file:
            ray = subprocess.Popen(
                guarded(command, signal.SIGTERM),
                env=env,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        up = False
        while ray.poll() is None and not stop.wait(0.1):
            if not up and STARTED in out.read_text(errors="replace"):
                up = True
                started()
        if not stop.is_set():
            print(
                f"dromos: Ray ended without a stop request:\n{out.read_text(errors='replace')[-3000:]}",
                flush=True,
            )
        ray.terminate()
        with suppress(subprocess.TimeoutExpired):
            ray.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(ray.pid, signal.SIGKILL)
        ray.wait()
        return 0 if stop.is_set() else 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
