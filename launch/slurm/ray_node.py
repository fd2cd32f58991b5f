"""One Ray cluster inside a Slurm job.

python -P -m launch.slurm.ray_node prepare FOLDER      creates FOLDER and the token in it, once per job
python -P -m launch.slurm.ray_node run FOLDER          runs the Ray node of this Slurm node, until the job ends
python -P -m launch.slurm.ray_node wait FOLDER NODES   waits until all nodes are up and prints the head's address

FOLDER is on a shared disk. It holds the token, the head's address, and one marker file per node that is up.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from data_pipeline.storage.files import publish
from launch.ray.process import start_command, supervise, token_env, write_token
from launch.slurm.job_step import node_address
from launch.supervise.rank_process import free_port

JOIN_SECONDS = 300


def run(shared: Path) -> int:
    """Run this node's part of the job's Ray cluster; Slurm node 0 is the head. Returns the exit code."""
    node, cpus = int(os.environ["SLURM_NODEID"]), int(os.environ.get("SLURM_CPUS_ON_NODE", "1"))
    host = socket.gethostbyname(node_address(os.environ["SLURMD_NODENAME"]))
    # On the node's own disk, with a short path: socket paths have at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="dromos-ray-"))
    port = free_port(host) if node == 0 else 0
    address = shared / "address"
    if node:
        _wait_until(address.exists, "the head of the job's Ray cluster is not up")
    join = address.read_text() if node else None
    command = start_command(folder, cpus, host, join, port)

    def started() -> None:
        if node == 0:
            publish(address, f"{host}:{port}".encode())
        publish(shared / f"node-{node}", b"")

    return supervise(command, folder, {**os.environ, **token_env(shared / "token")}, started)


def wait(shared: Path, nodes: int) -> str:
    """Wait until all nodes are up; returns the head's address."""
    _wait_until(
        lambda: len(list(shared.glob("node-*"))) >= nodes,
        f"not all {nodes} nodes of the job's Ray cluster are up",
    )
    return (shared / "address").read_text()


def _wait_until(condition: Callable[[], bool], problem: str) -> None:
    deadline = time.monotonic() + JOIN_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"dromos: {problem} after {JOIN_SECONDS} s")
        time.sleep(0.2)


def main(arguments: list[str]) -> int:
    command, folder, *nodes = arguments
    if command == "run":
        return run(Path(folder))
    if command == "wait":
        print(wait(Path(folder), int(nodes[0])))
        return 0
    Path(folder).mkdir(parents=True)
    write_token(Path(folder) / "token")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
