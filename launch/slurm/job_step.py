"""What the sbatch script calls on the nodes of a job: rendezvous address, rank environment, stage state, merge.

python -P -m launch.slurm.job_step meet                  prints address and port of the rendezvous
python -P -m launch.slurm.job_step rank -- COMMAND ...   becomes COMMAND, with the environment of one rank
python -P -m launch.slurm.job_step state RECIPE STAGE    prints `done` or `todo`
python -P -m launch.slurm.job_step merge RECIPE STAGE    runs a merge stage
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping

from data_pipeline.errors import UserError
from pretrain.run.exit_codes import DONE, USER_ERROR

FIRST_PORT, PORTS, TRIES = 20000, 20000, 100
USAGE = "meet | rank -- COMMAND ... | state RECIPE STAGE | merge RECIPE STAGE"


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


def state(recipe_path: str, name: str) -> str:
    """`done` or `todo`."""
    from launch.stage_state import is_done, stage_job
    from pretrain.recipe.load import load_recipe, run_dir

    recipe = load_recipe(recipe_path, stage=name)
    return "done" if is_done(run_dir(recipe), stage_job(recipe, name), recipe) else "todo"


def merge(recipe_path: str, name: str) -> None:
    """Run a merge stage in this process."""
    from pretrain.merge_stage import run_merge_stage
    from pretrain.recipe.load import load_recipe, run_dir

    recipe = load_recipe(recipe_path, stage=name)
    run_merge_stage(recipe, name, run_dir(recipe))


def main(arguments: list[str]) -> int:
    """Exit code of one command of the batch script; `rank` does not return."""
    try:
        match arguments:
            case ["meet"]:
                print(*meeting_point(os.environ))
            case ["rank", "--", *command] if command:
                os.execvpe(command[0], command, {**os.environ, **rank_env(os.environ)})
            case ["state", recipe_path, name]:
                print(state(recipe_path, name))
            case ["merge", recipe_path, name]:
                merge(recipe_path, name)
            case _:
                raise SystemExit(f"usage: python -P -m launch.slurm.job_step {USAGE}")
    except UserError as error:
        print(f"dromos: {error}", file=sys.stderr)
        return USER_ERROR
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
