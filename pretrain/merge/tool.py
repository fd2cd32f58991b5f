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
from pretrain.address import locate
from pretrain.merge import card, digests
from pretrain.merge.kernels import BLOCK
from pretrain.merge.layout import INDEX
from pretrain.merge.output_folder import link_or_copy, resumed_folder
from pretrain.merge.plan import Plan
from pretrain.merge.prepare import Opened, prepare
from pretrain.merge.record import jobs_plain, sealed
from pretrain.merge.request import request
from pretrain.merge.sources import FROZEN
from pretrain.merge.writer import Output, Progress, write_tensors

RECORD = "merge.json"


def plan(inputs: Sequence[str], *, run_dir: Path | None = None, **asked: Any) -> Plan:
    """What `merge` with the same arguments would do; writes nothing."""
    return prepare(request(inputs, **asked), run_dir=run_dir)[0][0]


def merge(
    inputs: Sequence[str],
    out: Path | str,
    *,
    run_dir: Path | None = None,
    chunk: int = BLOCK,
    threads: int | None = None,
    progress: Progress | None = None,
    durable: bool = False,
    **asked: Any,
) -> dict[str, Any]:
    """Merge `inputs`, streamed into the folder `out`, which appears only when it is complete.

    inputs: two or more addresses (pretrain.address).
    asked:  as of `pretrain.merge.request.request`: method, beta or weights, base, only, rules, copy_rest, dtype, ...
            Most often beta, of two inputs the weight of the first: theta = beta * A + (1 - beta) * B.
    durable: whether to wait for the disk before `out` appears, see `execute`.

    Returns the content of `out/merge.json`. A complete `out` of the same plan is left alone; UserError for any other.
    """
    plans, opened = prepare(request(inputs, **asked), run_dir=run_dir)
    return execute(plans, opened, [Path(out)], chunk, threads, progress, durable=durable)[0]


def execute(
    plans: Sequence[Plan],
    opened: Opened,
    folders: Sequence[Path],
    chunk: int = BLOCK,
    threads: int | None = None,
    progress: Progress | None = None,
    *,
    durable: bool = False,
    anew: bool = False,
) -> list[dict[str, Any]]:
    """Carry out plans that differ in their weights alone, in one pass; what is complete already is not done again.

    What an earlier call was killed over goes on. `durable` waits for the disk before a folder appears, so that it is
    whole after a power cut too; without it the system writes in its own time, as it does for a copy, and the digests
    in the record tell. `anew` discards what was begun from other inputs or for another plan.
    """
    prints = [source.hashes() for source in opened.sources]
    keys = [plan.key(prints) for plan in plans]
    records = [existing(folder, key) for folder, key in zip(folders, keys, strict=True)]
    todo = [i for i, record in enumerate(records) if record is None]
    with ExitStack() as stack:
        outputs = {}
        for i in todo:
            head = _head(plans[i], opened, prints, keys[i])
            partial, journal = stack.enter_context(
                resumed_folder(folders[i], head, plans[i].size, durable, anew)
            )
            outputs[i] = Output(plans[i], partial, journal)
        if todo:
            write_tensors(list(outputs.values()), opened.sources, chunk, threads, progress)
        for i, output in outputs.items():
            records[i] = made = sealed(_record(output, opened, prints, keys[i]))
            _add_companions(plans[i], output.folder)
            (output.folder / card.NAME).write_bytes(card.card(plans[i], opened.sources, made))
            (output.folder / RECORD).write_text(json.dumps(records[i], indent=1) + "\n")
    return [record for record in records if record is not None]


def _head(plan: Plan, opened: Opened, prints: list[dict[str, str]], key: str) -> dict[str, Any]:
    """What an output is made of, for its journal: the plan without its inputs, and they with their times."""
    inputs = {
        f"{source.address}: {Path(file.name).name}": file.identity
        for source in opened.sources
        for file in source.files
    }
    return {"plan": key, "jobs": plan.key([]), "inputs": inputs}


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


def _record(output: Output, opened: Opened, prints: list[dict[str, str]], key: str) -> dict[str, Any]:
    plan, written = output.plan, output.written()
    inputs = [
        {
            "address": source.address,
            "path": source.located.path,
            "step": source.located.step,
            "weight": plan.weights[i] if i < len(plan.weights) else None,
            "files": files,
            "read": {"tensors": len(written.inputs[i]), "digest": digests.of_names(written.inputs[i])},
        }
        for i, (source, files) in enumerate(zip(opened.sources, prints, strict=True))
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
        "output": {file.name: {"size": file.size, "digest": written.files[file.name]} for file in plan.files},
        "tensors": written.tensors,
        "digests": {"tensor": digests.RULE, "file": digests.FILE_RULE, "read": digests.READ_RULE},
        "dromos": _version(),
        "jobs": jobs_plain(plan),
    }


def _version() -> str:
    try:
        return version("dromos")
    except PackageNotFoundError:
        return "unknown"


def _add_companions(plan: Plan, folder: Path) -> None:
    """Config, tokenizer, frozen tensors, and the stage that says what the model is."""
    for name, content in plan.companions.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    if plan.index is not None:
        (folder / INDEX).write_bytes(plan.index)
    if plan.frozen is not None:
        link_or_copy(plan.frozen, folder / FROZEN)
    if plan.stage_dir is not None and (stage := model_stage(plan.stage_dir)) is not None:
        (folder / "resolved.yaml").write_bytes((stage / "resolved.yaml").read_bytes())


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
