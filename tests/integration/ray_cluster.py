"""A Ray cluster of two nodes on this machine, with the job API and token authentication, on private ports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from launch.ray.process import start_command, token_env, write_token
from launch.supervise.rank_process import free_port


class RayCluster:
    """`with RayCluster() as cluster`: cluster.env for dromos and `ray`, cluster.address of the job API."""

    def __init__(self, cpus: int = 1) -> None:
        self.cpus = cpus
        self.folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # socket paths may have 107 characters
        self.nodes: list[subprocess.Popen[bytes]] = []
        env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.env = {**env, **token_env(write_token(self.folder / "token"))}
        self.gcs, self.api = free_port(), free_port()
        self.address = f"http://127.0.0.1:{self.api}"
        self.file = self.folder / "cluster.yaml"
        self.file.write_text(f"kind: ray\naddress: {self.address}\nstop_seconds: 120\n")

    def __enter__(self) -> RayCluster:
        try:
            head = start_command(self.folder / "a", self.cpus, "127.0.0.1", None, self.gcs)
            with_api = [
                flag for flag in head if "dashboard-port" not in flag and "include-dashboard" not in flag
            ]
            self._node("head", [*with_api, "--include-dashboard=true", f"--dashboard-port={self.api}"])
            self._node(
                "second", start_command(self.folder / "b", self.cpus, "127.0.0.1", f"127.0.0.1:{self.gcs}")
            )
            self._wait_for_api()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _node(self, name: str, command: list[str]) -> None:
        """Start a node under the same supervisor as the Ray cluster of a local job."""
        folder = self.folder / name
        folder.mkdir()
        node = [sys.executable, "-P", "-m", "launch.ray.local_head", str(folder), *command]
        with open(self.folder / f"{name}.out", "wb") as out:
            process = subprocess.Popen(node, env=self.env, stdout=out, stderr=subprocess.STDOUT)
        self.nodes.append(process)
        deadline = time.monotonic() + 120
        while not (folder / "up").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"Ray's {name} node is not up\n{(self.folder / f'{name}.out').read_text()}"
                )
            time.sleep(0.1)

    def _wait_for_api(self) -> None:
        deadline = time.monotonic() + 120
        while self.ray("job", "list").returncode:
            if time.monotonic() > deadline:
                raise RuntimeError("Ray's job API does not answer")

    def ray(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the `ray` command against this cluster."""
        command = [sys.executable, "-m", "ray.scripts.scripts", *arguments, "--address", self.address]
        return subprocess.run(command, env=self.env, capture_output=True, text=True)

    def job_state(self, job: str) -> str:
        """RUNNING, STOPPED, SUCCEEDED, FAILED or PENDING, from the job API itself."""
        return str(self._api("GET", f"jobs/{job}")["status"])

    def stop_job(self, job: str) -> None:
        """What `ray job stop` sends; that command needs seconds to start."""
        self._api("POST", f"jobs/{job}/stop")

    def _api(self, method: str, path: str) -> dict[str, Any]:
        token = (self.folder / "token").read_text()
        request = urllib.request.Request(
            f"{self.address}/api/{path}", method=method, headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            content: dict[str, Any] = json.load(answer)
        return content

    def stop(self) -> None:
        for node in reversed(self.nodes):
            node.send_signal(signal.SIGTERM)
        for node in self.nodes:
            node.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
