"""Which stages are done, computed once per command and passed on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from data_pipeline.errors import UserError
from launch.job import StageJob
from pretrain.recipe.checks import addresses
from pretrain.recipe.dump import stage_record
from pretrain.recipe.lengths import total_steps
from pretrain.recipe.schema import MergeStage, Recipe, TrainStage
from pretrain.run.identity import read_record

LENGTHS = ("steps", "samples", "epochs")


def stage_job(recipe: Recipe, name: str) -> StageJob:
    """What a launcher needs to know of a stage; steps only where the recipe alone tells them."""
    stage = recipe.stages[name]
    if not isinstance(stage, TrainStage):
        return StageJob(name, "merge")
    steps = None if stage.train.epochs is not None else total_steps(stage)
    return StageJob(name, "train", steps, stage.loader.backend)


def is_done(folder: Path, stage: StageJob, recipe: Recipe) -> bool:
    """True if the result.json of a stage reaches the recipe's length. `folder` is the run folder.

    Raises UserError for a merge of weights that have changed since.
    """
    path = folder / stage.name / "result.json"
    try:
        result = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError:
        raise UserError(f"{path} is not JSON; delete it to run the stage again") from None
    if stage.kind == "merge":
        from pretrain.merge_stage import is_finished

        resolved = recipe.stages[stage.name]
        return isinstance(resolved, MergeStage) and is_finished(resolved, folder / stage.name)
    if stage.steps is not None and int(result.get("step", 0)) >= stage.steps:
        return True
    # Epochs, or samples whose batch changed on the way: then steps do not tell, but what was run to its end does.
    finished, wanted = read_record(folder / stage.name), stage_record(recipe, stage.name)
    return finished is not None and _length(finished) == _length(wanted)


def _length(record: dict) -> dict[str, float]:
    train = record["stage"].get("train") or {}
    return {unit: train[unit] for unit in LENGTHS if train.get(unit) is not None}


def reads(recipe: Recipe, name: str, folder: Path, stages: Iterable[StageJob]) -> bool:
    """Whether stage `name` takes weights from one of `stages`."""
    made = {(folder / stage.name).resolve() for stage in stages}
    return any(_candidates(address, folder) & made for _, address in addresses(recipe.stages[name]))


def _candidates(address: str, folder: Path) -> set[Path]:
    """Stage folders of this machine that the address may mean."""
    base = address.partition("@")[0]
    if "://" in address:
        return set()
    ways = [folder / base] if "/" not in base else [Path(base), folder.parent / base]
    return {way.resolve() for way in ways}
