"""What can be seen to go wrong before anything is written, and which stages are done."""

from __future__ import annotations

import dataclasses
import shlex
from contextlib import chdir
from pathlib import Path

from data_pipeline.errors import UserError
from launch import data_check
from launch.job import Job
from launch.stage_state import _candidates, is_done, stage_job
from pretrain.recipe.checks import addresses, world_size_check
from pretrain.recipe.schema import Recipe, TrainStage
from pretrain.run.address import locate
from pretrain.run.identity import check_run_folder

STARTS = {"init", "continue"}


def check(recipe: Recipe, job: Job) -> None:
    """All that needs the disks of the job, seen from the job's working directory."""
    if not Path(job.workdir).is_dir():
        raise UserError(
            f"--cluster {job.cluster_file}: workdir: {job.workdir} is no folder on this machine; where one submits "
            "must see the job's working directory"
        )
    with chdir(job.workdir):
        check_folder(recipe, job)
        check_predecessors(recipe, job)
        check_sources(recipe, job)


def check_ranks(recipe: Recipe, job: Job) -> None:
    """Every stream's batch must split evenly over the ranks."""
    for name, stage in _training(recipe, job):
        try:
            world_size_check(stage, job.world_size)
        except UserError as error:
            raise UserError(f"{job.recipe}: stage {name}: {error}") from None


def check_folder(recipe: Recipe, job: Job) -> None:
    """The run folder must be this recipe's, and its checkpoints of this many ranks where training goes on."""
    for stage in job.stages:
        done = is_done(job.folder, stage, recipe)
        check_run_folder(job.folder, recipe, stage.name, None if done else job.world_size)


def check_sources(recipe: Recipe, job: Job) -> None:
    """What the stages to run read must have tars, and samples in them that can be used. Of a job for a cluster,
    sources in object stores are left to the ranks: the machine that submits needs neither their packages nor keys."""
    stages = [stage.name for stage in job.stages if not is_done(job.folder, stage, recipe)]
    remote = job.on == "local"
    for stage, key, path, problem in data_check.missing_sources(recipe, stages, remote):
        made_here = data_check.is_prepared(path, recipe)
        advice = f"\nmake it with: dromos data prepare {shlex.quote(job.recipe)}" if made_here else ""
        raise UserError(f"{job.recipe}: stage {stage}: {key}: {problem}{advice}")
    if job.on == "local" or data_check.can_decode():
        try:
            data_check.check_contents(recipe, stages, remote)
        except UserError as error:
            raise UserError(f"{job.recipe}: {error}") from None


def check_predecessors(recipe: Recipe, job: Job) -> None:
    """Weights must be there, or come from a stage that this job runs before."""
    made: set[Path] = set()
    for stage in job.stages:
        done = is_done(job.folder, stage, recipe)
        for key, address in () if done else addresses(recipe.stages[stage.name]):
            if not _candidates(address, job.folder) & made:
                try:
                    locate(address, job.folder)
                except UserError as error:
                    where = f"{job.recipe}: stage {stage.name}: {'.'.join(key)}"
                    raise UserError(f"{where}: {_with_recipe(str(error), address, recipe, job)}") from None
        made.add((job.folder / stage.name).resolve())


def _training(recipe: Recipe, job: Job) -> list[tuple[str, TrainStage]]:
    found = ((stage.name, recipe.stages[stage.name]) for stage in job.stages)
    return [(name, stage) for name, stage in found if isinstance(stage, TrainStage)]


def _with_recipe(message: str, address: str, recipe: Recipe, job: Job) -> str:
    """The command that makes a stage of this very recipe, with this job's flags, can be written out."""
    name = address.partition("@")[0]
    if name not in recipe.stages:
        return message
    return message.replace(f"dromos run RECIPE --stage {name}", making(name, recipe, job).go_on())


def making(name: str, recipe: Recipe, job: Job) -> Job:
    """This job for a stage before it: without the overrides that are meant for others or say where a stage starts."""
    others = set(recipe.stages) - {name}
    kept = [
        override for override in job.overrides if override.split("=")[0].split(".")[0] not in others | STARTS
    ]
    return dataclasses.replace(job, stages=(stage_job(recipe, name),), overrides=tuple(kept))
