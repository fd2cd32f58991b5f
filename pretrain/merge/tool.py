"""One merge from addresses to a published folder: open, plan, write, record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import UserError
from data_pipeline.storage import publish
from pretrain.address import locate
from pretrain.merge.layout import INDEX
from pretrain.merge.plan import Plan
from pretrain.merge.prepare import Opened, prepare
from pretrain.merge.request import request
from pretrain.merge.sources import FROZEN
from pretrain.merge.writer import CHUNK, Progress, digests, link_or_copy, new_folder, write_tensors

RECORD = "merge.json"


def plan(inputs: Sequence[str], *, run_dir: Path | None = None, **asked: Any) -> Plan:
    """What `merge` with the same arguments would do; writes nothing."""
    return prepare(request(inputs, **asked), run_dir=run_dir)[0][0]


def merge(
    inputs: Sequence[str],
    out: Path | str,
    *,
    run_dir: Path | None = None,
    chunk: int = CHUNK,
    threads: int | None = None,
    progress: Progress | None = None,
    **asked: Any,
) -> dict[str, Any]:
    """Merge `inputs`, streamed into the folder `out`, which appears only when it is complete.

    inputs: two or more addresses (pretrain.address).
    asked:  as of `pretrain.merge.request.request`: method, beta or weights, base, only, rules, copy_rest, dtype, ...
            Most often beta, of two inputs the weight of the first: theta = beta * A + (1 - beta) * B.

    Returns the content of `out/merge.json`. A complete `out` of the same plan is left alone; UserError for any other.
    """
    plans, opened = prepare(request(inputs, **asked), run_dir=run_dir)
    return execute(plans, opened, [Path(out)], chunk, threads, progress)[0]


def execute(
    plans: Sequence[Plan],
    opened: Opened,
    folders: Sequence[Path],
    chunk: int = CHUNK,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Carry out plans that differ in their weights alone, in one pass; what is complete already is not done again."""
    hashes = [source.hashes() for source in opened.sources]
    keys = [plan.key(hashes) for plan in plans]
    records = [existing(folder, key) for folder, key in zip(folders, keys, strict=True)]
    todo = [i for i, record in enumerate(records) if record is None]
    needed = sum(plans[i].size for i in todo)
    with ExitStack() as stack:
        partial = {i: stack.enter_context(new_folder(folders[i], needed)) for i in todo}
        if todo:
            made = [partial[i] for i in todo]
            write_tensors([plans[i] for i in todo], opened.sources, made, chunk, threads, progress)
        for i in todo:
            record = _record(plans[i], opened, hashes, keys[i], partial[i])
            _add_companions(plans[i], partial[i])
            publish(partial[i] / RECORD, (json.dumps(record, indent=1) + "\n").encode())
            records[i] = record
    return [record for record in records if record is not None]


def existing(folder: Path, key: str) -> dict[str, Any] | None:
    """The record of a complete output of the same plan; None where there is no output yet."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    record = folder / RECORD
    if not record.is_file():
        raise UserError(
            f"{folder} exists and is not the output of a merge; choose another --out, or remove it"
        )
    content = json.loads(record.read_text())
    if content.get("plan") != key:
        raise UserError(f"{folder} holds another merge (see {record}); choose another --out, or remove it")
    return content


def _record(
    plan: Plan, opened: Opened, hashes: list[dict[str, str]], key: str, folder: Path
) -> dict[str, Any]:
    written: dict[str, dict[str, str | int]] = {}
    tensors: dict[str, str] = {}
    for file in plan.files:
        written[file.name], inside = digests(folder / file.name)
        tensors |= inside
    inputs = [
        {
            "address": source.address,
            "path": source.located.path,
            "step": source.located.step,
            "weight": plan.weights[i] if i < opened.inputs else None,
            "xxh64": files,
        }
        for i, (source, files) in enumerate(zip(opened.sources, hashes, strict=True))
    ]
    return {
        "plan": key,
        "method": plan.method,
        "theta": "sum of weight x input; each product rounded, added in this order, rounded once to the output type",
        "inputs": inputs,
        "asked": plan.asked,
        "mixed": sum(job.why == "mixed" for job in plan.jobs),
        "copied": {job.name: job.why for job in plan.jobs if job.why != "mixed"},
        "left_out": list(plan.left_out),
        "tied": plan.tied,
        "frozen": FROZEN if plan.frozen else None,
        "output": written,
        "tensors": tensors,
        "dromos": _version(),
    }


def _version() -> str:
    try:
        return version("dromos")
    except PackageNotFoundError:
        return "unknown"


def _add_companions(plan: Plan, folder: Path) -> None:
    """Config, tokenizer, frozen tensors, and the stage that says what the model is."""
    for name, content in plan.companions.items():
        publish(folder / name, content if isinstance(content, bytes) else content.read_bytes())
    if plan.index is not None:
        publish(folder / INDEX, plan.index)
    if plan.frozen is not None:
        link_or_copy(plan.frozen, folder / FROZEN)
    if plan.stage_dir is not None and (stage := model_stage(plan.stage_dir)) is not None:
        publish(folder / "resolved.yaml", (stage / "resolved.yaml").read_bytes())


def model_stage(stage_dir: Path) -> Path | None:
    """The folder of the training stage whose model these weights have: a merge has that of its parent."""
    path = stage_dir / "resolved.yaml"
    if not path.is_file():
        return None
    stage = yaml.safe_load(path.read_text())["stage"]
    if stage.get("kind") != "merge":
        return stage_dir
    parent = locate(stage.get("copy_rest") or next(iter(stage["inputs"])), stage_dir.parent)
    return model_stage(parent.stage_dir) if parent.stage_dir is not None else None
