"""The local door: the selected stages in order on this machine, one process group a training stage."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from launch import progress
from launch.environment import core_count
from launch.job import Job, StageJob
from launch.preflight import is_done
from launch.ranks import (
    DONE,
    FAILED,
    GO_ON,
    Group,
    Outcome,
    Rank,
    StopSignals,
    describe_exit,
    free_port,
    supervise,
)
from launch.run_folder import open_run
from pretrain.recipe import Recipe

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
        lines.append(f"# {stage.name}: training in {job.run_dir}/{stage.name}, {_ranks(job.world_size)}")
        for rank in range(job.world_size):
            env = [
                f"{name}={shlex.quote(value)}"
                for name, value in rank_env(job, rank, None, os.environ).items()
            ]
            lines.append(" ".join([*env, shlex.join(job.train_command(stage.name))]))
    return "\n".join(lines) + "\n"


def run(job: Job, recipe: Recipe, console: Console, rank_command: RankCommand | None = None) -> int:
    """Run the stages that are not done. `rank_command` stands in for the command of a rank, by stage name."""
    todo = [stage for stage in job.stages if not is_done(job.folder, stage, recipe)]
    for stage in job.stages:
        if stage not in todo:
            say(console, f"{stage.name}: done ({job.run_dir}/{stage.name})")
    if not todo:
        return DONE
    open_run(job, recipe)
    with ExitStack() as stack:
        environ = dict(os.environ)
        if any(stage.loader == "ray" for stage in todo):
            from launch.ray_head import ray_for_job

            environ |= stack.enter_context(ray_for_job(job, recipe, environ))
        for stage in todo:
            if stage.kind == "merge":
                code = merge(job, stage, recipe, console)
            else:
                code = train(job, stage, console, environ, rank_command or job.train_command)
            if code != DONE:
                if code == GO_ON:
                    say(console, f"to go on: {job.go_on()}")
                return code
    return DONE


def train(
    job: Job, stage: StageJob, console: Console, environ: Mapping[str, str], command: RankCommand
) -> int:
    """One training stage as one group of ranks."""
    folder = job.folder / stage.name
    port = free_port()
    ranks = [
        Rank(command(stage.name), {**environ, **rank_env(job, rank, port, environ)}, log_path(folder, rank))
        for rank in range(job.world_size)
    ]
    say(console, f"{stage.name}: {_ranks(job.world_size)}, logs in {job.run_dir}/{stage.name}/logs")
    with StopSignals() as stop:
        group = Group(ranks)
        with progress.view(stage.name, folder, stage.steps, console) as view:
            outcome = supervise(group, stop, view.update)
    report(job, stage, group, outcome, stop, console)
    return outcome.code


def log_path(stage_folder: Path, rank: int) -> Path:
    return stage_folder / "logs" / f"rank_{rank}.log"


def report(
    job: Job, stage: StageJob, group: Group, outcome: Outcome, stop: StopSignals, console: Console
) -> None:
    """Say how the stage ended; of a failure, which rank, how, and the end of its log."""
    if outcome.failed is not None:
        rank = outcome.failed
        how = describe_exit(outcome.codes[rank])
        log = os.path.relpath(group.ranks[rank].log)
        say(console, f"{stage.name}: rank {rank} of {job.world_size} ended with {how}; the end of {log}:")
        say(console, group.tail(rank) or "(it wrote nothing)")
    elif outcome.code == FAILED:
        say(console, f"{stage.name}: killed before the save ended; the last complete checkpoint stands")
        say(console, f"to go on: {job.go_on()}")
    elif outcome.code == GO_ON:
        began = all(code >= 0 for code in outcome.codes.values())
        why = f" on {stop.first}" if stop.first else ""
        say(
            console,
            f"{stage.name}: {'saved and stopped' if began else 'stopped before its ranks had begun'}{why}",
        )


def merge(job: Job, stage: StageJob, recipe: Recipe, console: Console) -> int:
    """One merge stage, in this process."""
    from pretrain.merge.stage import run_merge_stage

    say(console, f"{stage.name}: merging into {job.run_dir}/{stage.name}/weights")
    try:
        run_merge_stage(recipe, stage.name, job.folder)
    except KeyboardInterrupt:
        say(console, f"{stage.name}: interrupted")
        return GO_ON
    return DONE


def say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"
