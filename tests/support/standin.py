"""Replaces `dromos train` in tests of the launcher: writes metrics, saves on SIGTERM, and fails on request.

Environment variables: STANDIN_STEPS; STANDIN_SECONDS per step; STANDIN_SAVE_SECONDS per save; STANDIN_FAIL as
"RANK:KIND", where KIND is an exit code or the name of a signal; STANDIN_RAY lets rank 0 start an actor on the Ray
cluster of its environment. Every rank starts a child process, in place of a loader worker.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from launch.supervise.guard import guarded


def main(stage_folder: str) -> int:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    steps, seconds = int(os.environ["STANDIN_STEPS"]), float(os.environ.get("STANDIN_SECONDS", "0.02"))
    fail_rank, _, failure = os.environ.get("STANDIN_FAIL", "").partition(":")
    folder = Path(stage_folder)
    signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
    worker = subprocess.Popen(guarded(["sleep", "1000"]))
    report = {"pid": os.getpid(), "worker": worker.pid, "env": dict(os.environ), "argv": sys.argv}
    if os.environ.get("STANDIN_RAY") and rank == 0:
        report["ray_actor"] = start_actor()
    (folder / f"rank_{rank}.json").write_text(json.dumps(report))
    print(f"rank {rank} of {world} at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", flush=True)
    saved = folder / "saved"
    first = int(saved.read_text()) + 1 if saved.exists() else 1
    for step in range(first, steps + 1):
        if fail_rank == str(rank) and step == 3:
            fail(failure)
        time.sleep(seconds)
        if rank == 0:
            row = {"step": step, "loss": 1 / step, "time": {"step": seconds, "data_wait": 0.0}}
            with open(folder / "metrics.jsonl", "a") as metrics:
                metrics.write(json.dumps(row) + "\n")
        if signals:
            (folder / f"signals_{rank}").write_text(" ".join(signal.Signals(each).name for each in signals))
            if rank == 0:
                time.sleep(float(os.environ.get("STANDIN_SAVE_SECONDS", "0.1")))
                saved.write_text(str(step))
            return 75
    if rank == 0:
        (folder / "result.json").write_text(json.dumps({"step": steps}))
    return 0


def start_actor() -> int:
    """Start a Ray actor that outlives this function; returns its process id."""
    import ray

    class Actor:
        def pid(self) -> int:
            return os.getpid()

    handler = signal.getsignal(signal.SIGTERM)
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
    signal.signal(signal.SIGTERM, handler)  # ray.init replaces it
    actor = ray.remote(num_cpus=1)(Actor).remote()
    globals()["kept"] = actor  # Ray ends an actor without references
    return ray.get(actor.pid.remote())


def fail(kind: str) -> None:
    if kind.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[kind])
        time.sleep(60)
    print("the rank failed on request", file=sys.stderr, flush=True)
    sys.exit(int(kind))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
