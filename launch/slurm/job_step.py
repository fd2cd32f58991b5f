"""Commands that the sbatch script runs on the nodes of a job: rendezvous, rank environment, stage state, merge.

python -P -m launch.slurm.job_step rendezvous            prints the address and port of the rendezvous
python -P -m launch.slurm.job_step rank -- COMMAND ...   replaces itself by COMMAND, with the environment of a rank
python -P -m launch.slurm.job_step lock FD RUN           locks RUN/.lock, which is open as FD, for the batch script
python -P -m launch.slurm.job_step state RECIPE STAGE    prints `done` or `todo`
python -P -m launch.slurm.job_step merge RECIPE STAGE    runs a merge stage; exits with 75 on a stop signal
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from launch.run_lock import about_slurm
from launch.supervise.stop_signals import signals_interrupt
from pretrain.run.exit_codes import DONE, RUN_AGAIN
from pretrain.run.failures import explain, print_traceback, say
from pretrain.run.lock import WAIT_SECONDS, lock_descriptor

FIRST_PORT, PORT_COUNT, PORT_ATTEMPTS = 20000, 20000, 100
USAGE = "rendezvous | lock FD RUN | rank -- COMMAND ... | state RECIPE STAGE | merge RECIPE STAGE"


def rank_env(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of torch.distributed, derived from srun's; DeepSpeed does not derive them.

    Raises KeyError outside srun.
    """
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
    """Number of tasks on this node. Slurm lists the numbers by node, in order: `2(x3),1` is 2, 2, 2, 1."""
    counts: list[str] = []
    for part in environ["SLURM_STEP_TASKS_PER_NODE"].split(","):
        number, _, repeated = part.partition("(x")
        counts += [number] * int(repeated.rstrip(")") or 1)
    return counts[int(environ["SLURM_NODEID"])]


def node_address(name: str) -> str:
    """Address of a node by its Slurm name."""
    return parse_node_address(_scontrol("show", "node", name))


def parse_node_address(output: str) -> str:
    """NodeAddr in the output of `scontrol show node`. The node name itself may not resolve."""
    match = re.search(r"\bNodeAddr=(\S+)", output)
    if not match:
        raise SystemExit(f"dromos: no NodeAddr in the output of scontrol show node:\n{output}")
    return match[1]


def ports(job_id: int) -> list[int]:
    """Ports to try, in order. They differ between jobs, so that jobs on one node rarely try the same port."""
    return [FIRST_PORT + (job_id + attempt * 997) % PORT_COUNT for attempt in range(PORT_ATTEMPTS)]


def first_free(candidates: list[int]) -> int:
    """The first of `candidates` that can be bound on this machine; SystemExit if there is none."""
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


def rendezvous(environ: Mapping[str, str]) -> tuple[str, int]:
    """(address, free port) of the job's first node, which runs the batch script."""
    names = _scontrol("show", "hostnames", environ["SLURM_JOB_NODELIST"]).split()
    return node_address(names[0]), first_free(ports(int(environ["SLURM_JOB_ID"])))


def _scontrol(*arguments: str) -> str:
    return subprocess.run(["scontrol", *arguments], check=True, capture_output=True, text=True).stdout


def lock(descriptor: int, folder: Path) -> None:
    """Lock the run folder for this job's batch script, the parent of this process, while it has `descriptor` open.

    Waits for an earlier start of the job that is ending. Raises UserError if another launch or job holds the lock.
    """
    holder = about_slurm(folder, os.environ["SLURM_JOB_ID"]) | {"pid": str(os.getppid())}
    lock_descriptor(descriptor, folder, holder, WAIT_SECONDS)


def state(recipe_path: str, name: str) -> str:
    """State of a stage: `done` or `todo`."""
    from launch.stage_state import stage_job, stage_states
    from pretrain.recipe.load import load_recipe, run_dir

    recipe = load_recipe(recipe_path, stage=name)
    states = stage_states(recipe, [stage_job(recipe, name)], run_dir(recipe))
    return "todo" if states.remaining else "done"


def merge(recipe_path: str, name: str) -> int:
    """Run a merge stage in this process; returns the exit code, RUN_AGAIN after a stop signal."""
    try:
        with signals_interrupt(signal.SIGUSR1):  # the batch script sends USR1 to srun, which forwards it
            from pretrain.merge_stage import run_merge_stage
            from pretrain.recipe.load import load_recipe, run_dir

            recipe = load_recipe(recipe_path, stage=name)
            run_merge_stage(recipe, name, run_dir(recipe))
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return RUN_AGAIN
    return DONE


def main(arguments: list[str]) -> int:
    """Run one command of the batch script; returns the exit code. `rank` does not return."""
    try:
        match arguments:
            case ["rendezvous"]:
                print(*rendezvous(os.environ))
            case ["lock", descriptor, folder]:
                lock(int(descriptor), Path(folder))
            case ["rank", "--", *command] if command:
                os.execvpe(command[0], command, {**os.environ, **rank_env(os.environ)})
            case ["state", recipe_path, name]:
                print(state(recipe_path, name))
            case ["merge", recipe_path, name]:
                return merge(recipe_path, name)
            case _:
                raise SystemExit(f"usage: python -P -m launch.slurm.job_step {USAGE}")
    except Exception as error:
        failure = explain(error)
        if failure is None:
            raise
        say(failure.message)
        print_traceback(error)
        return failure.code
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
