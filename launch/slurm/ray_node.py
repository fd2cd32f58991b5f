"""One Ray cluster inside a Slurm job.

python -P -m launch.slurm.ray_node prepare FOLDER      creates FOLDER and the token in it, once per job
python -P -m launch.slurm.ray_node run FOLDER          runs the Ray node of this Slurm node, until the job ends
python -P -m launch.slurm.ray_node wait FOLDER NODES PID   waits until all nodes are up, prints the head's address

FOLDER is on a shared disk. It holds the token, the head's address, and a marker file per node that is up or failed.
PID is the srun that runs the nodes.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from data_pipeline.storage.files import publish
from launch.ray.process import start_command, supervise, token_env, write_token
from launch.slurm.job_step import node_address
from launch.supervise.rank_process import free_port

JOIN_SECONDS = 300


def run(shared: Path) -> int:
    """Run this node's part of the job's Ray cluster; Slurm node 0 is the head. Returns the exit code.

    A node that fails leaves a marker, so that the others and the batch script do not wait for it.
    """
    node = int(os.environ["SLURM_NODEID"])
    code = 1
    try:
        code = _run(shared, node)
    finally:
        if code:
            with suppress(OSError):  # the folder may be gone, or its disk full
                (shared / f"failed-{node}").touch()
    return code


def _run(shared: Path, node: int) -> int:
    cpus = int(os.environ.get("SLURM_CPUS_ON_NODE", "1"))
    host = socket.gethostbyname(node_address(os.environ["SLURMD_NODENAME"]))
    port = free_port(host) if node == 0 else 0
    address = shared / "address"
    if node:
        _wait_until(address.exists, "the head of the job's Ray cluster is not up", shared)
    join = address.read_text() if node else None
    # On the node's own disk, with a short path: socket paths have at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="dromos-ray-"))
    command = start_command(folder, cpus, host, join, port)

    def started() -> None:
        if node == 0:
            publish(address, f"{host}:{port}".encode())
        publish(shared / f"node-{node}", b"")

    return supervise(command, folder, {**os.environ, **token_env(shared / "token")}, started)


def wait(shared: Path, nodes: int, step: int | None = None) -> str:
    """Wait until all nodes are up; returns the head's address.

    SystemExit as soon as a node has failed, or the srun that runs them, process `step`, has ended.
    """
    _wait_until(
        lambda: len(list(shared.glob("node-*"))) >= nodes,
        f"not all {nodes} nodes of the job's Ray cluster are up",
        shared,
        step,
    )
    return (shared / "address").read_text()


def _wait_until(condition: Callable[[], bool], problem: str, shared: Path, step: int | None = None) -> None:
    deadline = time.monotonic() + JOIN_SECONDS
    while not condition():
        ended = step is not None and not _runs(step)  # before the markers, which it may have written last
        for failed in sorted(shared.glob("failed-*")):
            node = failed.name.partition("-")[2]
            log = shared.parent / f"ray-{os.environ.get('SLURM_JOB_ID')}-{node}.log"
            raise SystemExit(f"dromos: the Ray of node {node} of the job ended at its start; see {log}")
        if ended and not condition():
            raise SystemExit(f"dromos: {problem}, and the srun that runs them has ended")
        if time.monotonic() > deadline:
            raise SystemExit(f"dromos: {problem} after {JOIN_SECONDS} s")
        time.sleep(0.2)


def _runs(pid: int) -> bool:
    """True while a process runs; one whose parent has not collected its exit code has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def main(arguments: list[str]) -> int:
    command, folder, *nodes = arguments
    if command == "run":
        return run(Path(folder))
    if command == "wait":
        count, *step = map(int, nodes)
        print(wait(Path(folder), count, *step))
        return 0
    Path(folder).mkdir(parents=True)
    write_token(Path(folder) / "token")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
