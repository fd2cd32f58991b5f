"""One Ray for a Slurm job: each node runs `python -P -m launch.slurm.ray_node run FOLDER`.

`prepare FOLDER` comes before it, `wait FOLDER NODES` prints the address. FOLDER, on a shared disk, holds token,
address, and one mark file per node that is up."""

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
from launch.slurm.job_step import node_address_of
from launch.supervise.rank_process import free_port

JOIN_SECONDS = 300


def wait_until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + JOIN_SECONDS
    while not true():
        if time.monotonic() > deadline:
            raise SystemExit(f"dromos: {what} after {JOIN_SECONDS} s")
        time.sleep(0.2)


def run(shared: Path) -> int:
    """One node of the job's Ray; node 0 is the head."""
    node, cpus = int(os.environ["SLURM_NODEID"]), int(os.environ.get("SLURM_CPUS_ON_NODE", "1"))
    host = socket.gethostbyname(node_address_of(os.environ["SLURMD_NODENAME"]))
    folder = Path(
        tempfile.mkdtemp(prefix="dromos-ray-")
    )  # node-local, and short: sockets allow 107 characters
    port = free_port(host) if node == 0 else 0
    address = shared / "address"
    if node:
        wait_until(address.exists, "the head of the job's Ray is not up")
    join = address.read_text() if node else None
    command = start_command(folder, cpus, host, join, port)

    def started() -> None:
        if node == 0:
            publish(address, f"{host}:{port}".encode())
        publish(shared / f"node-{node}", b"")

    return supervise(command, folder, {**os.environ, **token_env(shared / "token")}, started)


def wait(shared: Path, nodes: int) -> str:
    """The head's address, when all nodes are up."""
    wait_until(
        lambda: len(list(shared.glob("node-*"))) >= nodes, f"not all {nodes} nodes of the job's Ray are up"
    )
    return (shared / "address").read_text()


def main(arguments: list[str]) -> int:
    what, folder, *nodes = arguments
    if what == "run":
        return run(Path(folder))
    if what == "wait":
        print(wait(Path(folder), int(nodes[0])))
        return 0
    Path(folder).mkdir(parents=True)
    write_token(Path(folder) / "token")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
