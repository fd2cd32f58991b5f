"""Stands in for srun(1): starts the tasks of all nodes on this machine, with the variables that Slurm sets for each.

Options that it does not know are refused, as by srun. Like a site with KillOnBadExit, it kills the other tasks when one
fails, unless told otherwise; with --wait it kills those that still run so many seconds after the first end. It ends
with the highest exit code of its tasks (128 + N after signal N), and forwards SIGUSR1 to them. Started by the `srun` of
tests/support/fake_slurm.py.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from itertools import groupby


def main() -> int:
    parser = argparse.ArgumentParser(prog="srun", allow_abbrev=False)
    for name in ("nodes", "ntasks", "ntasks-per-node"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name, default in (("cpus-per-task", 0), ("kill-on-bad-exit", 1), ("wait", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", required=True)
    parser.add_argument("--open-mode", choices=["append", "truncate"], default="truncate")
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    asked = parser.parse_args()
    per_node = asked.ntasks_per_node
    node_of = [task // per_node for task in range(asked.ntasks)]
    if node_of[-1] + 1 != asked.nodes:
        parser.error(f"{asked.ntasks} tasks, {per_node} a node, do not fill {asked.nodes} nodes")
    per_nodes = [len(list(tasks)) for _, tasks in groupby(node_of)]
    compressed = ",".join(f"{n}(x{len(list(same))})" for n, same in groupby(per_nodes))
    tasks: list[subprocess.Popen[bytes]] = []
    signal.signal(signal.SIGUSR1, lambda number, _: [task.send_signal(number) for task in tasks])
    for task, node in enumerate(node_of):
        env = os.environ | {
            "SLURM_PROCID": str(task),
            "SLURM_NTASKS": str(asked.ntasks),
            "SLURM_LOCALID": str(task % per_node),
            "SLURM_NODEID": str(node),
            "SLURM_STEP_TASKS_PER_NODE": compressed.replace("(x1)", ""),
            "SLURMD_NODENAME": f"n{node}",
        }
        if asked.cpus_per_task:
            env["SLURM_CPUS_PER_TASK"] = str(asked.cpus_per_task)
        path = asked.output.replace("%%", "\0").replace("%t", str(task)).replace("%j", env["SLURM_JOB_ID"])
        with open(path.replace("\0", "%"), "ab" if asked.open_mode == "append" else "wb") as log:
            tasks.append(subprocess.Popen(asked.command, env=env, stdout=log, stderr=log))
    first_end = float("inf")
    while None in (codes := [task.poll() for task in tasks]):
        ended = [code for code in codes if code is not None]
        first_end = min(first_end, time.monotonic()) if ended else first_end
        late = bool(asked.wait) and time.monotonic() > first_end + asked.wait
        if late or (asked.kill_on_bad_exit and any(ended)):
            for task in tasks:
                task.kill()
        time.sleep(0.01)
    return max(128 - code if code and code < 0 else code or 0 for code in codes)


if __name__ == "__main__":
    sys.exit(main())
