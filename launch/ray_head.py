"""One Ray for one job on this machine: started when no cluster is named, gone on every exit path of the launcher."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from data_pipeline.errors import UserError
from launch.environment import core_count
from launch.guard import guarded
from launch.job import Job
from launch.process import free_port
from pretrain.recipe import Recipe, TrainStage

START_SECONDS = 90
STOP_SECONDS = 20
STARTED = "Ray runtime started."
MIB = 1 << 20


@contextmanager
def ray_for_job(job: Job, recipe: Recipe, environ: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Environment that leads loaders to a Ray: the cluster that is named, else one that lasts as long as the block.

    The block's Ray is a child that the kernel ends with the launcher. Its temporary folder has a short path of its
    own (Ray's sockets allow 107 characters), its ports are free ones, and it takes a token that only this job knows.
    """
    if named := job.cluster.get("gcs_address") or environ.get("RAY_ADDRESS"):
        yield {"RAY_ADDRESS": named}
        return
    if importlib.util.find_spec("ray") is None:
        raise UserError("loader.backend: ray needs Ray; install it with: pip install 'dromos[ray]'")
    folder = Path(tempfile.mkdtemp(prefix="dromos-ray-"))
    try:
        port = free_port()
        env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(_write_token(folder / "token"))}
        command = [
            sys.executable,
            "-m",
            "launch.ray_head",
            str(folder),
            *start_command(folder, port, job, recipe),
        ]
        with open(folder / "out", "wb") as out:
            head = subprocess.Popen(
                guarded(command, signal.SIGTERM),
                env={**environ, **env, "RAY_USAGE_STATS_ENABLED": "0"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _wait_until_started(head, folder / "out")
            yield {**env, "RAY_ADDRESS": f"127.0.0.1:{port}"}
        finally:
            head.terminate()
            head.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def start_command(folder: Path, port: int, job: Job, recipe: Recipe) -> list[str]:
    """`ray start` with nothing at a well-known port, no dashboard, and a store of a few batches."""
    stages = [recipe.stages[stage.name] for stage in job.stages if stage.loader == "ray"]
    training = [stage for stage in stages if isinstance(stage, TrainStage)]
    ports = {
        name: free_port()
        for name in (
            "ray-client-server-port",
            "dashboard-port",
            "dashboard-agent-listen-port",
            "dashboard-agent-grpc-port",
            "runtime-env-agent-port",
            "metrics-export-port",
        )
    }
    options = {
        "port": port,
        **ports,
        "node-ip-address": "127.0.0.1",
        "include-dashboard": "false",
        "num-cpus": core_count(),
        "num-gpus": 0,
        "object-store-memory": store_bytes(training),
        "temp-dir": folder / "s",
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        *flags,
    ]


def store_bytes(stages: list[TrainStage]) -> int:
    """Room for four steps of pixels, between 128 MiB and 2 GiB."""
    step = max(
        (sum(s.batch * 3 * s.image.size**2 for s in stage.data.values() if s.image) for stage in stages),
        default=0,
    )
    return min(2048 * MIB, max(128 * MIB, 4 * step))


def _write_token(path: Path) -> Path:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return path


def _wait_until_started(head: subprocess.Popen[bytes], out: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while STARTED not in (said := out.read_text(errors="replace")):
        if head.poll() is not None or time.monotonic() > deadline:
            why = "ended" if head.poll() is not None else f"was not up after {START_SECONDS} s"
            raise RuntimeError(f"the job's Ray {why}:\n{said[-2000:]}")
        time.sleep(0.05)


def main(arguments: list[str]) -> None:
    """Keep `ray start --block` as a child; when asked to stop, end all its processes and remove its folder."""
    folder, *command = arguments
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: asked.set())
    ray = subprocess.Popen(guarded(command, signal.SIGTERM), start_new_session=True)
    while ray.poll() is None and not asked.wait(0.1):
        pass
    ray.terminate()
    with suppress(subprocess.TimeoutExpired):
        ray.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(ray.pid, signal.SIGKILL)
    ray.wait()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
