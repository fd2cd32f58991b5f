"""A merge stage of a recipe: locks, merges, evaluates, writes result.json.

Its folder holds resolved.yaml, weights/, frozen.safetensors if the inputs have one, and result.json, which is written
last and marks the stage as finished.
"""

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
from pretrain.merge.planning.request import make_request
from pretrain.recipe.dump import dump_plain, stage_record
from pretrain.recipe.schema import MergeStage, Recipe
from pretrain.recipe.sections.evaluation import Evaluation
from pretrain.run.folder import read_mapping
from pretrain.run.identity import ABSENT, check_run_folder
from pretrain.run.lock import FolderLock
from pretrain.weights.folder import FROZEN
from pretrain.weights.source import WeightSource

AGAIN = "delete the stage's folder to merge again"


def run_merge_stage(
    recipe: Recipe, name: str, run_dir: Path | str, progress: Progress | None = None
) -> dict[str, Any]:
    """Run the merge stage `name` in `run_dir/name`; returns the content of its result.json.

    A finished stage is not run again. A killed one starts over, but keeps its weights if they were complete. Raises
    UserError before anything is written when an input has not finished, does not fit the others, or has other weights
    than those in the existing merge.
    """
    stage = recipe.stages[name]
    if not isinstance(stage, MergeStage):
        raise UserError(f"stage {name} is a training stage, not a merge stage")
    run_dir = Path(run_dir)
    folder = run_dir / name
    check_run_folder(run_dir, recipe, name)
    if is_finished(stage, folder):
        return read_mapping(folder / "result.json", AGAIN) or {}
    began = time.monotonic()
    merge_request = make_request(
        list(stage.inputs), weights=list(stage.inputs.values()), only=stage.only, copy_rest=stage.copy_rest
    )
    (plan,), opened = prepare(merge_request, run_dir=run_dir)  # raises before the folder is created
    lock = FolderLock(folder)
    try:
        record = dump_plain(stage_record(recipe, name))
        publish(folder / "resolved.yaml", record.encode())
        # frozen.safetensors and resolved.yaml go into the stage folder, as in a training stage, not into weights/.
        merged = execute(
            [replace(plan, frozen=None, stage_dir=None)],
            opened,
            [folder / "weights"],
            progress=progress,
            durable=True,
            discard_unfinished=True,
        )
        if plan.frozen is not None:
            link_or_copy(plan.frozen, folder / FROZEN)
        result = {
            "step": 0,
            "eval": _metrics(folder, stage.eval),
            "plan": merged[0]["plan"],
            "notes": list(plan.notes),
            "weights": dict(zip(stage.inputs, plan.weights, strict=True)),
            "seconds": round(time.monotonic() - began, 3),
        }
        publish(folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    finally:
        lock.release()
    return result


def is_finished(stage: MergeStage, folder: Path) -> bool:
    """True when the merge in `folder` is complete.

    Raises UserError when an input now has other weights than were merged. Inputs that are deleted or in training
    cannot be compared; then the stage counts as finished if result.json exists.
    """
    path = folder / "weights" / RECORD
    finished = (folder / "result.json").is_file()
    if not path.is_file():
        return False
    try:
        opened = open_inputs(list(stage.inputs), [stage.copy_rest], folder.parent)
    except UserError:
        return finished
    merged = _merged_inputs(path)
    changed = [line for source in opened.sources for line in _changed(source, merged.get(source.address))]
    if changed:
        lines = "\n".join(f"  {line}" for line in changed)
        raise UserError(
            f"{folder} was merged from other weights than its inputs have now:\n{lines}\n"
            f"delete {folder} to merge again, or restore the weights it was merged from"
        )
    return finished


def _merged_inputs(path: Path) -> dict[str, dict[str, Any]]:
    """The inputs in a merge.json, by address. Raises UserError if it is damaged."""
    inputs = (read_mapping(path, AGAIN) or {}).get("inputs")
    listed = inputs if isinstance(inputs, list) else []
    found = {
        entry["address"]: entry
        for entry in listed
        if isinstance(entry, dict)
        and isinstance(entry.get("address"), str)
        and isinstance(entry.get("files"), dict)
        and "path" in entry
    }
    if not found or len(found) != len(listed):
        raise UserError(f"{path} is damaged: its list of inputs is not complete; {AGAIN}")
    return found


def _changed(source: WeightSource, merged: dict[str, Any] | None) -> list[str]:
    """`ADDRESS: OLD -> NEW` when an input differs from its entry in merge.json, as a list of no or one line."""
    if merged is None:  # the merge of another recipe, which check_run_folder reports
        return []
    now, then = source.hashes(), merged["files"]
    if now == then:
        return []
    if source.located.path != merged["path"]:
        return [f"{source.address}: {merged['path']} -> {source.located.path}"]
    files = [name for name in sorted({*now, *then}) if now.get(name) != then.get(name)]
    hashes = (f"{name} {then.get(name, ABSENT)} -> {now.get(name, ABSENT)}" for name in files)
    return [f"{source.address}: {source.located.path}: " + ", ".join(hashes)]


def _metrics(folder: Path, evaluation: Evaluation) -> dict[str, float]:
    """Held-out metrics of the merged weights, under the same names as in a training stage's result.json."""
    if not any(evaluation.tasks()):
        return {}
    from pretrain.build.objective import load_trained
    from pretrain.build.tokenizer import optional_tokenizer
    from pretrain.evaluate.suite import SINGLE_PROCESS, evaluate, flat_scalars

    objective, trained = load_trained(str(folder / "weights"))
    return flat_scalars(
        evaluate(objective, objective.model, trained, optional_tokenizer(trained), SINGLE_PROCESS, evaluation)
    )
