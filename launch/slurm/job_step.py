"""What a Slurm job needs on its nodes: the address where its ranks meet, and a rank's environment from SLURM_*.

`python -P -m launch.slurm.job_step meet` prints address and port; `... rank -- COMMAND` becomes the
command of one task."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping

FIRST_PORT, PORTS, TRIES = 20000, 20000, 100


def rank_env(environ: Mapping[str, str]) -> dict[str, str]:
    """torch.distributed's variables from srun's; DeepSpeed does not derive them. Raises KeyError outside srun."""
    env = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_NTASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": _tasks_here(environ),
    }
    if "OMP_NUM_THREADS" not in environ:
        env["OMP_NUM_THREADS"] = environ.get("SLURM_CPUS_PER_TASK", "1")
    return env


def _tasks_here(environ: Mapping[str, str]) -> str:
    """Tasks on this node: `2(x3),1` lists them by node, in order."""
    counts: list[str] = []
    for part in environ["SLURM_STEP_TASKS_PER_NODE"].split(","):
        number, _, repeated = part.partition("(x")
        counts += [number] * int(repeated.rstrip(")") or 1)
    return counts[int(environ["SLURM_NODEID"])]


def node_address(shown: str) -> str:
    """NodeAddr in what `scontrol show node` prints: node names need not resolve."""
    found = re.search(r"\bNodeAddr=(\S+)", shown)
    if not found:
        raise SystemExit(f"dromos: no NodeAddr in the answer of scontrol show node:\n{shown}")
    return found[1]


def node_address_of(name: str) -> str:
    return node_address(_scontrol("show", "node", name))


def ports(job_id: int) -> list[int]:
    """Ports to try, in order: other for another job, so that jobs that share a node rarely meet."""
    return [FIRST_PORT + (job_id + attempt * 997) % PORTS for attempt in range(TRIES)]


def first_free(candidates: list[int]) -> int:
    """The first port that can be bound on this machine."""
    for port in candidates:
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise SystemExit(
        f"dromos: none of {len(candidates)} ports from {candidates[0]} on is free on {socket.gethostname()}"
    )


def meeting_point(environ: Mapping[str, str]) -> tuple[str, int]:
    """Address of the job's first node, which is the one that runs the batch script, and a free port on it."""
    names = _scontrol("show", "hostnames", environ["SLURM_JOB_NODELIST"]).split()
    return node_address_of(names[0]), first_free(ports(int(environ["SLURM_JOB_ID"])))


def _scontrol(*arguments: str) -> str:
    return subprocess.run(["scontrol", *arguments], check=True, capture_output=True, text=True).stdout


def main(arguments: list[str]) -> None:
    if arguments == ["meet"]:
        print(*meeting_point(os.environ))
    elif arguments[:2] == ["rank", "--"] and len(arguments) > 2:
        os.execvpe(arguments[2], arguments[2:], {**os.environ, **rank_env(os.environ)})
    else:
        raise SystemExit("usage: python -P -m launch.slurm.job_step meet | rank -- COMMAND ...")


if __name__ == "__main__":
    main(sys.argv[1:])
