"""Name and recipe of the training stage behind a folder of weights."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from data_pipeline.errors import UserError
from pretrain.recipe.plugins import import_plugins
from pretrain.recipe.schema import TrainStage
from pretrain.run.address import model_stage
from pretrain.run.folder import read_record


def read_stage(stage_dir: Path) -> tuple[str, TrainStage]:
    """Name and recipe of the training stage that defines the model of the weights in `stage_dir`.

    For a merge stage: the stage of `copy_rest`, else of its first input (`model_stage`). Raises UserError when there is
    none.
    """
    folder = model_stage(stage_dir)
    if folder is None:
        raise UserError(
            f"{stage_dir}: its model is unknown: resolved.yaml is missing there, or an input of its merge does not "
            "come from a Dromos run"
        )
    import_plugins()
    record = read_record(folder) or {}
    try:
        return str(record["name"]), TrainStage.model_validate(record["stage"])
    except (KeyError, ValidationError) as error:
        if isinstance(error, ValidationError):
            found = error.errors(include_url=False)[0]
            where = ".".join(map(str, found["loc"]))
            problem = (
                f"{where}: {found['msg']}; a run of an earlier version cannot be read, train the stage again"
            )
        else:
            problem = f"it has no {error}"
        raise UserError(f"{folder / 'resolved.yaml'} is not a valid stage record: {problem}") from None
