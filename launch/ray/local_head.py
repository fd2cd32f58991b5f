"""Starts a Ray cluster for one local job if none is named, and stops it when the job or the launcher ends."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.errors import UserError
from launch.environment import core_count
from launch.job import Job
from launch.ray.process import start_command, supervise, token_env, write_token
from launch.supervise.guard import guarded
from launch.supervise.rank_process import free_port

START_SECONDS = 120


@contextmanager
def ray_for_job(job: Job, environ: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Environment that connects loaders to Ray: to the named cluster, else to a new one.

    The new cluster is a child process. It ends with the `with` statement; if the launcher dies before, the kernel ends
    it. Its temporary folder has a short path (Ray's socket paths have at most 107 characters), its ports are free ones,
    and it requires a token that only this job has. Raises UserError if Ray is not installed, RuntimeError if it does
    not start.
    """
    if address := job.cluster.get("gcs_address") or environ.get("RAY_ADDRESS"):
        yield {"RAY_ADDRESS": address}
        return
    if importlib.util.find_spec("ray") is None:
        raise UserError("loader.backend: ray needs Ray; install it with: pip install 'dromos[ray]'")
    folder, port = Path(tempfile.mkdtemp(prefix="dromos-ray-")), free_port()
    try:
        env = token_env(write_token(folder / "token"))
        command = start_command(folder, core_count(), "127.0.0.1", None, port)
        with tempfile.TemporaryFile("w+") as output:
            head = subprocess.Popen(
                guarded(
                    [sys.executable, "-P", "-m", "launch.ray.local_head", str(folder), *command],
                    signal.SIGTERM,
                ),
                env={**environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                if not _is_up(head, folder):
                    head.terminate()
                    head.wait()
                    output.seek(0)
                    raise RuntimeError(
                        f"the job's Ray ended at its start, or was not up after {START_SECONDS} s\n{output.read()}"
                    )
                yield {**env, "RAY_ADDRESS": f"127.0.0.1:{port}"}
            finally:
                head.terminate()
                head.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_up(head: subprocess.Popen[bytes], folder: Path) -> bool:
    deadline = time.monotonic() + START_SECONDS
    while not (folder / "up").exists():
        if head.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def main(arguments: list[str]) -> int:
    """Run the head until a signal: from the launcher, or from the kernel when the launcher dies."""
    folder, *command = arguments
    return supervise(command, Path(folder), dict(os.environ), (Path(folder) / "up").touch)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
