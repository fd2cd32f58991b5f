"""The local door: the selected stages in order on this machine, one process group a training stage."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from rich.console import Console

from launch.environment import core_count
from launch.job import Job, StageJob
from launch.run_folder import open_run
from launch.supervise.rank_group import LocalGroup
from launch.supervise.rank_process import Rank, free_port
from launch.supervise.stage_runner import log_path, ranks, run_stages, say, undone
from pretrain.recipe.schema import Recipe
from pretrain.run.exit_codes import DONE, GO_ON

RankCommand = Callable[[str], list[str]]


def rank_env(job: Job, rank: int, port: int | None, environ: Mapping[str, str]) -> dict[str, str]:
    """What a rank's environment has beside what the launcher's has."""
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
        # gloo otherwise listens on the address of the host's name, which a laptop loses with its network
        defaults |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    return {name: value for name, value in defaults.items() if name not in environ} | env


def render(job: Job) -> str:
    """One command a rank, as a person could type them."""
    lines = []
    for stage in job.stages:
        if stage.kind == "merge":
            lines.append(f"# {stage.name}: merge into {job.run_dir}/{stage.name}/weights, in this process")
            continue
        lines.append(f"# {stage.name}: training in {job.run_dir}/{stage.name}, {ranks(job.world_size)}")
        for rank in range(job.world_size):
            env = rank_env(job, rank, None, os.environ)
            assigned = [f"{name}={shlex.quote(value)}" for name, value in env.items()]
            lines.append(" ".join([*assigned, shlex.join(job.train_command(stage.name))]))
    return "\n".join(lines) + "\n"


def run(job: Job, recipe: Recipe, console: Console, rank_command: RankCommand | None = None) -> int:
    """Run the stages that are not done. `rank_command` stands in for the command of a rank, by stage name."""
    todo = undone(job, recipe, console)
    if not todo:
        return DONE
    open_run(job, recipe)
    with ExitStack() as stack:
        environ = dict(os.environ)
        if any(stage.loader == "ray" for stage in todo):
            from launch.ray.local_head import ray_for_job

            environ |= stack.enter_context(ray_for_job(job, environ))

        def start(stage: StageJob) -> LocalGroup:
            return LocalGroup(
                local_ranks(job, stage, environ, (rank_command or job.train_command)(stage.name))
            )

        def merge(stage: StageJob) -> int:
            return merge_here(job, stage, recipe, console)

        return run_stages(job, todo, console, start, merge, job.go_on())


def local_ranks(job: Job, stage: StageJob, environ: Mapping[str, str], command: list[str]) -> list[Rank]:
    port = free_port()
    envs = [{**environ, **rank_env(job, rank, port, environ)} for rank in range(job.world_size)]
    folder = job.folder / stage.name
    return [Rank(command, env, log_path(folder, rank)) for rank, env in enumerate(envs)]


def merge_here(job: Job, stage: StageJob, recipe: Recipe, console: Console) -> int:
    """One merge stage, in this process."""
    from pretrain.merge_stage import run_merge_stage

    try:
        run_merge_stage(recipe, stage.name, job.folder)
    except KeyboardInterrupt:
        say(console, f"{stage.name}: interrupted")
        return GO_ON
    return DONE
