"""Which stages of a job are done, computed once per command by `stage_states` and passed on.

A merge stage is done only if its inputs have not changed, so `stage_states` opens and fingerprints them, which takes
time. Checks, stage runner and backends therefore share one `StageStates`. Only `run_merge_stage` looks again, before it
merges: an earlier stage of the job may have changed the inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import UserError
from launch.job import StageJob
from pretrain.recipe.checks import addresses
from pretrain.recipe.dump import stage_record
from pretrain.recipe.lengths import total_steps
from pretrain.recipe.schema import MergeStage, Recipe, TrainStage
from pretrain.run.folder import read_mapping, read_record
from pretrain.run.identity import recorded_length


@dataclass(frozen=True)
class StageStates:
    """Stages that are done and stages to run.

    done:      names of the stages whose outputs are complete as the run folder is now.
    remaining: stages to run, in order. A merge that reads a remaining stage is also run again, even if it is
               done now: that stage will change its inputs.
    """

    done: frozenset[str]
    remaining: tuple[StageJob, ...]


def stage_states(recipe: Recipe, stages: Sequence[StageJob], folder: Path) -> StageStates:
    """The state of each of `stages` in the run folder `folder`. Raises UserError as `is_done` does.

    Call it in the job's working directory: addresses of weights may be relative paths.
    """
    done = frozenset(stage.name for stage in stages if is_done(folder, stage, recipe))
    remaining: list[StageJob] = []
    for stage in stages:
        stale = stage.kind == "merge" and reads_any(recipe, stage.name, folder, remaining)
        if stale or stage.name not in done:
            remaining.append(stage)
    return StageStates(done, tuple(remaining))


def stage_job(recipe: Recipe, name: str) -> StageJob:
    """The part of a stage that launchers need; `steps` is None where the recipe alone does not determine it."""
    stage = recipe.stages[name]
    if not isinstance(stage, TrainStage):
        return StageJob(name, "merge")
    steps = None if stage.train.epochs is not None else total_steps(stage)
    return StageJob(name, "train", steps, stage.loader.backend)


def is_done(folder: Path, stage: StageJob, recipe: Recipe) -> bool:
    """True if result.json of a training stage reaches the recipe's length, or if a merge stage has finished.

    `folder` is the run folder. Raises UserError if result.json is damaged, or if a finished merge was made from
    other weights than its inputs hold now.
    """
    path = folder / stage.name / "result.json"
    advice = "delete it to run the stage again"
    result = read_mapping(path, advice)
    if result is None:
        return False
    if stage.kind == "merge":
        from pretrain.merge_stage import is_finished

        resolved = recipe.stages[stage.name]
        return isinstance(resolved, MergeStage) and is_finished(resolved, folder / stage.name)
    step = result.get("step")
    if step is None:
        return False  # also for a length in epochs, which the record alone would call reached
    if not isinstance(step, int):
        raise UserError(f"{path} is damaged: step is {step!r}; {advice}")
    if stage.steps is not None and step >= stage.steps:
        return True
    # Steps do not decide for a length in epochs, or in samples if the batch changed during the run. The stage is
    # done if the run that finished had the same length.
    finished, current = read_record(folder / stage.name), stage_record(recipe, stage.name)
    return recorded_length(finished) == recorded_length(current)


def reads_any(recipe: Recipe, name: str, folder: Path, stages: Iterable[StageJob]) -> bool:
    """True if stage `name` takes weights from one of `stages`."""
    outputs = {(folder / stage.name).resolve() for stage in stages}
    return any(stage_folders(address, folder) & outputs for _, address in addresses(recipe.stages[name]))


def stage_folders(address: str, folder: Path) -> set[Path]:
    """Local stage folders that `address` can name; empty for a URL."""
    base = address.partition("@")[0]
    if "://" in address:
        return set()
    candidates = [folder / base] if "/" not in base else [Path(base), folder.parent / base]
    return {candidate.resolve() for candidate in candidates}
