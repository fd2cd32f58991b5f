"""Checks of a job before anything is written: working directory, ranks, run folder, weights and data."""

from __future__ import annotations

import dataclasses
import shlex
from contextlib import chdir
from pathlib import Path

from data_pipeline.errors import UserError
from launch import data_check
from launch.job import Job
from launch.stage_state import StageStates, stage_folders, stage_job, stage_states
from pretrain.recipe.checks import addresses
from pretrain.recipe.schema import Recipe
from pretrain.run.address import StageNotReady, locate
from pretrain.run.identity import check_run_folder

START_KEYS = {"init", "continue"}


def check(recipe: Recipe, job: Job) -> StageStates:
    """Check everything that needs the job's disks, from the job's working directory; returns the stage states.

    Raises UserError.
    """
    if not Path(job.workdir).is_dir():
        raise UserError(
            f"--cluster {job.cluster_file}: workdir: {job.workdir} is not a folder on this machine; the machine that "
            "submits must see the job's working directory"
        )
    with chdir(job.workdir):
        states = stage_states(recipe, job.stages, job.folder)
        check_folder(recipe, job, states)
        check_predecessors(recipe, job, states)
        check_sources(recipe, job, states)
    return states


def check_folder(recipe: Recipe, job: Job, states: StageStates) -> None:
    """Raises UserError unless the run folder belongs to this recipe.

    A stage that will resume needs the same world size.
    """
    for stage in job.stages:
        world_size = None if stage.name in states.done else job.world_size
        check_run_folder(job.folder, recipe, stage.name, world_size)


def check_sources(recipe: Recipe, job: Job, states: StageStates) -> None:
    """Raises UserError unless every source of the stages that are not done has tars with usable samples.

    For a job on a cluster, only the ranks check sources in object stores: the machine that submits needs neither
    their packages nor their keys.
    """
    stages = [stage.name for stage in job.stages if stage.name not in states.done]
    remote = job.on == "local"
    for stage_name, key, path, problem in data_check.missing_sources(recipe, stages, remote):
        prepared = data_check.is_prepared(path, recipe)
        advice = f"\nmake it with: dromos data prepare {shlex.quote(job.recipe)}" if prepared else ""
        raise UserError(f"{job.recipe}: stage {stage_name}: {key}: {problem}{advice}")
    if job.on == "local" or data_check.can_decode():
        try:
            data_check.check_contents(recipe, stages, remote)
        except UserError as error:
            raise UserError(f"{job.recipe}: {error}") from None


def check_predecessors(recipe: Recipe, job: Job, states: StageStates) -> None:
    """Raises UserError unless all weights that the stages read exist, or an earlier stage of this job makes them."""
    outputs: set[Path] = set()
    for stage in job.stages:
        if stage.name not in states.done:
            for key, address in addresses(recipe.stages[stage.name]):
                if not stage_folders(address, job.folder) & outputs:
                    try:
                        locate(address, job.folder)
                    except UserError as error:
                        where = f"{job.recipe}: stage {stage.name}: {'.'.join(key)}"
                        raise UserError(f"{where}: {_advice(error, address, recipe, job)}") from None
        outputs.add((job.folder / stage.name).resolve())


def _advice(error: UserError, address: str, recipe: Recipe, job: Job) -> str:
    """The message of `error`; for a stage of this recipe, with the exact command that runs it."""
    name = address.partition("@")[0]
    if isinstance(error, StageNotReady) and name in recipe.stages:
        return error.with_command(job_for_predecessor(name, recipe, job).resume_command())
    return str(error)


def job_for_predecessor(name: str, recipe: Recipe, job: Job) -> Job:
    """This job for stage `name` instead.

    Leaves out the overrides of other stages, and `init` and `continue`, which belong to the later stage.
    """
    dropped = (set(recipe.stages) - {name}) | START_KEYS
    overrides = [
        override for override in job.overrides if override.split("=")[0].split(".")[0] not in dropped
    ]
    return dataclasses.replace(job, stages=(stage_job(recipe, name),), overrides=tuple(overrides))
