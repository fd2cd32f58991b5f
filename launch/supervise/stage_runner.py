"""Runs a job's stages in order, wherever their ranks run, and says how each one ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from launch.job import Job, StageJob
from launch.stage_state import is_done, reads
from launch.supervise import progress
from launch.supervise.rank_group import Group, Outcome, StopSignals, describe_exit, supervise
from pretrain.recipe.schema import Recipe
from pretrain.run.exit_codes import DONE, FAILED, GO_ON

StartGroup = Callable[[StageJob], Group]
Merge = Callable[[StageJob], int]


def undone(job: Job, recipe: Recipe, console: Console) -> list[StageJob]:
    """The stages that are left to run; a line for each that is not.

    A merge of a stage that is left is left, too: it is judged when its inputs are what they will be.
    """
    left: list[StageJob] = []
    for stage in job.stages:
        later = stage.kind == "merge" and reads(recipe, stage.name, job.folder, left)
        if not later and is_done(job.folder, stage, recipe):
            say(console, f"{stage.name}: done ({job.run_dir}/{stage.name})")
        else:
            left.append(stage)
    return left


def run_stages(
    job: Job, todo: list[StageJob], console: Console, start: StartGroup, merge: Merge, go_on: str
) -> int:
    """Run the stages until one does not end well. `go_on`: the command that continues, said where one can."""
    for stage in todo:
        if stage.kind == "merge":
            say(console, f"{stage.name}: merging into {job.run_dir}/{stage.name}/weights")
            code = merge(stage)
        else:
            code = train(job, stage, console, start, go_on)
        if code != DONE:
            if code == GO_ON:
                say(console, f"to go on: {go_on}")
            return code
    return DONE


def train(job: Job, stage: StageJob, console: Console, start: StartGroup, go_on: str) -> int:
    """One training stage as one group of ranks."""
    folder = job.folder / stage.name
    say(console, f"{stage.name}: {ranks(job.world_size)}, logs in {job.run_dir}/{stage.name}/logs")
    with StopSignals() as stop:
        group = start(stage)
        with progress.view(stage.name, folder, stage.steps, console) as view:
            outcome = supervise(group, stop, view.update)
    report(job, stage, group, outcome, stop, console, go_on)
    return outcome.code


def report(
    job: Job, stage: StageJob, group: Group, outcome: Outcome, stop: StopSignals, console: Console, go_on: str
) -> None:
    """Say how the stage ended; of a failure, which rank, how, and the end of its log."""
    if outcome.failed is not None:
        rank = outcome.failed
        how = describe_exit(outcome.codes[rank])
        log = log_path(Path(job.run_dir) / stage.name, rank)
        say(console, f"{stage.name}: rank {rank} of {job.world_size} ended with {how}; the end of {log}:")
        say(console, group.tail(rank) or "(it wrote nothing)")
    elif outcome.code == FAILED:
        say(console, f"{stage.name}: killed before the save ended; the last complete checkpoint stands")
        say(console, f"to go on: {go_on}")
    elif outcome.code == GO_ON:
        began = all(code >= 0 for code in outcome.codes.values())
        why = f" on {stop.first}" if stop.first else ""
        say(
            console,
            f"{stage.name}: {'saved and stopped' if began else 'stopped before its ranks had begun'}{why}",
        )


def log_path(stage_folder: Path, rank: int) -> Path:
    return stage_folder / "logs" / f"rank_{rank}.log"


def say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"
