"""Runs a job's stages in order on any backend, and reports how each stage ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console

from launch.job import Job, StageJob
from launch.stage_state import StageStates
from launch.supervise import progress
from launch.supervise.output import print_line
from launch.supervise.rank_group import Group, Outcome, describe_exit, supervise
from launch.supervise.stop_signals import StopSignals, signals_interrupt
from pretrain.recipe.schema import Recipe
from pretrain.run.exit_codes import DONE, FAILED, RUN_AGAIN

StartGroup = Callable[[StageJob], Group]


def print_done(job: Job, states: StageStates, console: Console) -> None:
    """One line per stage that is done and does not run again."""
    for stage in job.stages:
        if stage not in states.remaining:
            print_line(console, f"{stage.name}: done ({job.run_dir}/{stage.name})")


def run_stages(
    job: Job,
    recipe: Recipe,
    stages: Iterable[StageJob],
    console: Console,
    start: StartGroup,
    resume_command: str,
) -> int:
    """Run `stages` in order and stop at the first one that does not end with DONE; returns its exit code.

    `start` starts the ranks of a training stage; a merge stage runs in this process. `resume_command` is printed when
    the job stops in a state from which it can resume.
    """
    for stage in stages:
        if stage.kind == "merge":
            code = merge(job, stage, recipe, console)
        else:
            code = train(job, stage, console, start, resume_command)
        if code != DONE:
            if code == RUN_AGAIN:
                print_line(console, f"to resume: {resume_command}")
            return code
    return DONE


def train(job: Job, stage: StageJob, console: Console, start: StartGroup, resume_command: str) -> int:
    """Run one training stage as one group of ranks; returns its exit code."""
    folder = job.folder / stage.name
    ranks = count_ranks(job.world_size)
    print_line(console, f"{stage.name}: {ranks}, logs in {job.run_dir}/{stage.name}/logs")
    with StopSignals() as stop:
        group = start(stage)
        with progress.view(stage.name, folder, stage.steps, console) as view:
            outcome = supervise(group, stop, view.update)
    report(job, stage, group, outcome, stop, console, resume_command)
    return outcome.code


def merge(job: Job, stage: StageJob, recipe: Recipe, console: Console) -> int:
    """Run one merge stage in this process; returns its exit code, RUN_AGAIN after a stop signal."""
    print_line(console, f"{stage.name}: merging into {job.run_dir}/{stage.name}/weights")
    try:
        with signals_interrupt():
            from pretrain.merge_stage import run_merge_stage

            result = run_merge_stage(recipe, stage.name, job.folder)
            for note in result.get("notes", []):
                print_line(console, f"{stage.name}: note: {note}")
    except KeyboardInterrupt:
        print_line(console, f"{stage.name}: interrupted")
        return RUN_AGAIN
    return DONE


def report(
    job: Job,
    stage: StageJob,
    group: Group,
    outcome: Outcome,
    stop: StopSignals,
    console: Console,
    resume_command: str,
) -> None:
    """Print how the stage ended; after a failure, the rank, the cause and the end of its log."""
    if outcome.failed is not None:
        rank = outcome.failed
        cause = describe_exit(outcome.codes[rank])
        log = log_path(Path(job.run_dir) / stage.name, rank)
        print_line(
            console, f"{stage.name}: rank {rank} of {job.world_size} ended with {cause}; the end of {log}:"
        )
        print_line(console, group.tail(rank) or "(the log is empty)")
    elif outcome.code == FAILED:
        print_line(
            console, f"{stage.name}: killed before the save ended; the last complete checkpoint is intact"
        )
        print_line(console, f"to resume: {resume_command}")
    elif outcome.code == RUN_AGAIN:
        started = all(code >= 0 for code in outcome.codes.values())
        state = "saved and stopped" if started else "stopped before its ranks had started"
        cause = f" on {stop.first}" if stop.first else ""
        print_line(console, f"{stage.name}: {state}{cause}")


def log_path(stage_folder: Path, rank: int) -> Path:
    """The log of a rank."""
    return stage_folder / "logs" / f"rank_{rank}.log"


def count_ranks(number: int) -> str:
    """`1 rank`, `2 ranks`."""
    return "1 rank" if number == 1 else f"{number} ranks"
