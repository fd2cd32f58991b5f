"""A merge stage of a recipe: weights/, frozen tensors, resolved.yaml, figures, and result.json last."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.storage.atomic_folder import link_or_copy
from data_pipeline.storage.files import publish
from pretrain.merge.execute import execute
from pretrain.merge.output.record import RECORD
from pretrain.merge.output.writer import Progress
from pretrain.merge.planning.inputs import open_inputs
from pretrain.merge.planning.planner import prepare
from pretrain.merge.planning.request import request
from pretrain.recipe.dump import dump_plain, stage_record
from pretrain.recipe.schema import Evaluation, MergeStage, Recipe
from pretrain.run.identity import ABSENT, check_run_folder
from pretrain.run.lock import FolderLock
from pretrain.weights.folder import FROZEN
from pretrain.weights.source import WeightSource


def run_merge_stage(
    recipe: Recipe, name: str, run_dir: Path | str, progress: Progress | None = None
) -> dict[str, Any]:
    """Carry out stage `name` in `run_dir/name`; returns the content of its result.json.

    A finished stage is left alone; a killed one begins again, unless its weights were complete. Raises UserError,
    before anything is written, when a parent has not finished, is not what it was when the weights were merged, or
    does not fit the others.
    """
    stage = recipe.stages[name]
    if not isinstance(stage, MergeStage):
        raise UserError(f"stage {name} is a training, not a merge")
    run_dir = Path(run_dir)
    folder = run_dir / name
    check_run_folder(run_dir, recipe, name)
    if is_finished(stage, folder):
        return json.loads((folder / "result.json").read_text())
    began = time.monotonic()
    asked = request(
        list(stage.inputs), weights=list(stage.inputs.values()), only=stage.only, copy_rest=stage.copy_rest
    )
    (plan,), opened = prepare(asked, run_dir=run_dir)
    lock = FolderLock(folder)
    try:
        record = dump_plain(stage_record(recipe, name))
        publish(folder / "resolved.yaml", record.encode())
        # What describes the model lies in the stage's folder, where a training stage has it too.
        merged = execute(
            [replace(plan, frozen=None, stage_dir=None)],
            opened,
            [folder / "weights"],
            progress=progress,
            durable=True,
            anew=True,
        )
        if plan.frozen is not None:
            link_or_copy(plan.frozen, folder / FROZEN)
        result = {
            "step": 0,
            "eval": _figures(folder, stage.eval),
            "plan": merged[0]["plan"],
            "weights": dict(zip(stage.inputs, plan.weights, strict=True)),
            "seconds": round(time.monotonic() - began, 3),
        }
        publish(folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    finally:
        lock.release()
    return result


def is_finished(stage: MergeStage, folder: Path) -> bool:
    """Whether the merge in `folder` has ended; UserError when an input has other weights now than it was made from.

    Inputs that are gone, or training further at the moment, cannot be compared: the merge stays what it was.
    """
    path = folder / "weights" / RECORD
    ended = (folder / "result.json").is_file()
    if not path.is_file():
        return False
    try:
        opened = open_inputs(list(stage.inputs), [stage.copy_rest], folder.parent)
    except UserError:
        return ended
    taken = {entry["address"]: entry for entry in json.loads(path.read_text())["inputs"]}
    changed = [line for source in opened.sources for line in _changed(source, taken.get(source.address))]
    if changed:
        lines = "\n".join(f"  {line}" for line in changed)
        raise UserError(
            f"{folder} was merged from other weights than its inputs hold now:\n{lines}\n"
            f"delete {folder} to merge them again, or put back what it was merged from"
        )
    return ended


def _changed(source: WeightSource, taken: dict[str, Any] | None) -> list[str]:
    """What an input was when it was merged and what it is now, where the two differ."""
    if taken is None:  # another recipe's, which check_run_folder says
        return []
    now, then = source.hashes(), taken["files"]
    if now == then:
        return []
    if source.located.path != taken["path"]:
        return [f"{source.address}: {taken['path']} -> {source.located.path}"]
    files = [name for name in sorted({*now, *then}) if now.get(name) != then.get(name)]
    hashes = (f"{name} {then.get(name, ABSENT)} -> {now.get(name, ABSENT)}" for name in files)
    return [f"{source.address}: {source.located.path}: " + ", ".join(hashes)]


def _figures(folder: Path, wanted: Evaluation) -> dict[str, float]:
    """Held-out figures of the merged weights, by the names that a training stage gives them."""
    if not wanted.zero_shot and not wanted.perplexity:
        return {}
    from pretrain.build.objective import load_trained, stage_tokenizer
    from pretrain.evaluate.suite import ALONE, evaluate, flat

    objective, trained = load_trained(str(folder / "weights"))
    return flat(evaluate(objective, objective.model, trained, stage_tokenizer(trained), ALONE, wanted))
