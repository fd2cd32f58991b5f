"""The Ray actor of one rank: starts the rank on its node, forwards signals, and reports its exit code."""

from __future__ import annotations

import os
from pathlib import Path

from launch.supervise.rank_process import Rank, RankProcess, free_port

# Variables of the actor's own Ray worker. A rank that connects to the cluster itself must not inherit them.
RAY_INTERNAL = ("RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_NODE_ID", "RAY_WORKER_ID", "RAY_RAYLET_SOCKET_NAME")


class RankActor:
    """The rank is a child of the actor's process and dies with it. Only `kill` waits; the other methods return
    immediately."""

    def __init__(self) -> None:
        self.child: RankProcess | None = None

    def location(self) -> tuple[str, str, list[str]]:
        """(node id, node address, ids of the GPUs that Ray assigned to this actor)."""
        import ray

        gpus = [str(number) for number in ray.get_gpu_ids()]
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), gpus

    def port(self, host: str) -> int:
        """A free port on this node."""
        return free_port(host)

    def start(self, command: list[str], env: dict[str, str], log: str, workdir: str) -> int:
        """Start the rank; returns its process id."""
        inherited = {
            name: value for name, value in os.environ.items() if name not in (*RAY_INTERNAL, "DROMOS_JOB")
        }
        self.child = RankProcess(Rank(command, {**inherited, **env}, Path(log), workdir))
        return self.child.process.pid

    def poll(self) -> int | None:
        return self.child.poll() if self.child else None

    def send(self, number: int) -> None:
        if self.child:
            self.child.send(number)

    def kill(self) -> None:
        if self.child:
            self.child.kill()

    def tail(self) -> str:
        return self.child.tail() if self.child else ""
