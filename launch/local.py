"""Local backend: runs the remaining stages in order on this machine, one process group per training stage."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from rich.console import Console

from launch.environment import core_count
from launch.job import Job, StageJob
from launch.run_folder import open_run
from launch.run_lock import run_lock
from launch.stage_state import StageStates
from launch.supervise.rank_group import LocalGroup
from launch.supervise.rank_process import Rank, free_port
from launch.supervise.stage_runner import count_ranks, log_path, print_done, run_stages
from pretrain.recipe.schema import Recipe
from pretrain.run.exit_codes import DONE

RankCommand = Callable[[str], list[str]]


def render(job: Job) -> str:
    """The command of every rank, ready to paste. The launcher chooses MASTER_PORT when it starts the ranks."""
    lines = []
    for stage in job.stages:
        if stage.kind == "merge":
            lines.append(f"# {stage.name}: merge into {job.run_dir}/{stage.name}/weights, in this process")
            continue
        ranks = count_ranks(job.world_size)
        lines.append(f"# {stage.name}: training in {job.run_dir}/{stage.name}, {ranks}")
        for rank in range(job.world_size):
            env = rank_env(job, rank, None, os.environ)
            assignments = [f"{name}={shlex.quote(value)}" for name, value in env.items()]
            lines.append(" ".join([*assignments, shlex.join(job.train_command(stage.name))]))
    return "\n".join(lines) + "\n"


def run(
    job: Job,
    recipe: Recipe,
    states: StageStates,
    console: Console,
    rank_command: RankCommand | None = None,
) -> int:
    """Run the stages that remain; returns the exit code. Raises UserError while another launch uses the run folder.

    `rank_command` maps a stage name to the command of its ranks, in place of `job.train_command`.
    """
    print_done(job, states, console)
    if not states.remaining:
        return DONE
    with ExitStack() as stack:
        stack.enter_context(run_lock(job, console))  # before anything is written
        open_run(job, recipe)
        environ = dict(os.environ)
        if any(stage.loader == "ray" for stage in states.remaining):
            from launch.ray.local_head import ray_for_job

            environ |= stack.enter_context(ray_for_job(job, environ))

        def start(stage: StageJob) -> LocalGroup:
            command = (rank_command or job.train_command)(stage.name)
            return LocalGroup(local_ranks(job, stage, environ, command))

        return run_stages(job, recipe, states.remaining, console, start, job.resume_command())


def local_ranks(job: Job, stage: StageJob, environ: Mapping[str, str], command: list[str]) -> list[Rank]:
    """All ranks of a stage, with one rendezvous port."""
    port = free_port()
    envs = [{**environ, **rank_env(job, rank, port, environ)} for rank in range(job.world_size)]
    folder = job.folder / stage.name
    return [Rank(command, env, log_path(folder, rank)) for rank, env in enumerate(envs)]


def rank_env(job: Job, rank: int, port: int | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that a rank gets in addition to the launcher's `environ`."""
    env = {
        **job.env,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(job.world_size),
        "LOCAL_WORLD_SIZE": str(job.ranks_per_node),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port) if port else "FREE_PORT",
        "PYTHONUNBUFFERED": "1",
    }
    defaults = {"OMP_NUM_THREADS": str(max(1, core_count() // job.ranks_per_node))}
    if not job.gpus_per_node:
        # By default gloo listens on the address of the host name, which stops working when the network is gone.
        defaults |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    return {name: value for name, value in defaults.items() if name not in environ} | env
