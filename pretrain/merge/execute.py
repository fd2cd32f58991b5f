"""One merge from addresses to a published folder: open, plan, write, record."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline.errors import UserError
from data_pipeline.storage.atomic_folder import link_or_copy, tidy
from data_pipeline.storage.files import exists, is_remote, join, read_bytes, remove, sizes
from pretrain.merge.merge_plan import Plan
from pretrain.merge.output import model_card
from pretrain.merge.output.local import LocalOutput
from pretrain.merge.output.record import RECORD, jobs_plain, sealed
from pretrain.merge.output.remote import MARK, RemoteOutput, half_published, uploaded_folder
from pretrain.merge.output.resumed_folder import resumed_folder
from pretrain.merge.output.writer import Output, Progress, write_tensors, written
from pretrain.merge.planning.describe import ROUNDING, THETA
from pretrain.merge.planning.inputs import OpenedInputs
from pretrain.merge.planning.lineage import ancestors
from pretrain.merge.planning.output_layout import INDEX
from pretrain.merge.planning.planner import prepare
from pretrain.merge.planning.request import request
from pretrain.run.address import model_stage
from pretrain.weights import digests
from pretrain.weights.companions import read_companion
from pretrain.weights.dtypes import ELEMENTS_PER_BLOCK
from pretrain.weights.folder import FROZEN

OPEN = 200
"""files that may be open besides those of outputs"""


def plan(inputs: Sequence[str], *, run_dir: Path | None = None, **asked: Any) -> Plan:
    """What `merge` with the same arguments would do; writes nothing."""
    return prepare(request(inputs, **asked), run_dir=run_dir)[0][0]


def merge(
    inputs: Sequence[str],
    out: Path | str,
    *,
    run_dir: Path | None = None,
    chunk: int = ELEMENTS_PER_BLOCK,
    threads: int | None = None,
    progress: Progress | None = None,
    durable: bool = False,
    **asked: Any,
) -> dict[str, Any]:
    """Merge `inputs`, streamed into the folder `out`, which appears only when it is complete.

    inputs: two or more addresses (pretrain.run.address).
    asked:  as of `pretrain.merge.planning.request.request`: method, beta or weights, base, only, rules,
            copy_rest, dtype, ...
            Most often beta, of two inputs the weight of the first: theta = beta * A + (1 - beta) * B.
    durable: whether to wait for the disk before `out` appears, see `execute`.

    Returns the content of `out/merge.json`. A complete `out` of the same plan is left alone; UserError for any other.
    """
    plans, opened = prepare(request(inputs, **asked), run_dir=run_dir)
    return execute(plans, opened, [out], chunk, threads, progress, durable=durable)[0]


def execute(
    plans: Sequence[Plan],
    opened: OpenedInputs,
    folders: Sequence[Path | str],
    chunk: int = ELEMENTS_PER_BLOCK,
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
    A folder may be in an object store: what was sent before a kill is computed again, but not sent again.
    """
    folders = [_followed(str(folder)) for folder in folders]
    prints = [source.hashes() for source in opened.sources]
    keys = [plan.key(prints) for plan in plans]
    for out in folders:
        check_apart(str(out), opened)
    records = [existing(str(o), key, plan.request) for o, key, plan in zip(folders, keys, plans, strict=True)]
    todo = [i for i, record in enumerate(records) if record is None]
    _allow_open(OPEN + sum(len(plans[i].files) + 2 for i in todo))
    with ExitStack() as stack:
        outputs: dict[int, LocalOutput | RemoteOutput] = {}
        for i in todo:
            if is_remote(str(folders[i])):
                folder = uploaded_folder(str(folders[i]), keys[i], len(folders))
                uploads = stack.enter_context(folder)
                outputs[i] = RemoteOutput(plans[i], uploads)
            else:
                head = _head(plans[i], opened, prints, keys[i])
                resumed = resumed_folder(Path(folders[i]), head, plans[i].size, durable, anew)
                outputs[i] = LocalOutput(plans[i], *stack.enter_context(resumed))
        if todo:
            write_tensors(list(outputs.values()), opened.sources, chunk, threads, progress)
            _check_inputs(opened)
        for i, output in outputs.items():
            files = _beside(plans[i])
            beside = {n: xxhash.xxh64_hexdigest(c) for n, c in files.items() if isinstance(c, bytes)}
            records[i] = made = sealed(_record(output, opened, prints, keys[i]) | {"beside": beside})
            files |= {model_card.NAME: model_card.card(plans[i], opened.sources, made)}
            _add(output, files | {RECORD: (json.dumps(made, indent=1) + "\n").encode()})
    return [record for record in records if record is not None]


def _check_inputs(opened: OpenedInputs) -> None:
    """UserError where a mapped file was changed after the look at it that goes before every read."""
    for file in (file for source in opened.sources for file in source.files):
        if not file.remote:
            file.check_unchanged()


def _allow_open(files: int) -> None:
    """Raise this process's limit of open files, which a sweep of many betas needs. UserError where it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or files <= soft:
        return
    if hard != resource.RLIM_INFINITY and files > hard:
        raise UserError(
            f"{files:,} files would be open at once, and {hard:,} may be; write fewer outputs at a time, or raise the "
            "limit (ulimit -n)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))


def _head(plan: Plan, opened: OpenedInputs, prints: list[dict[str, str]], key: str) -> dict[str, Any]:
    """What an output is made of, for its journal: the plan without its inputs, and they with their times."""
    inputs = {
        f"{source.address}: {Path(file.name).name}": file.identity
        for source in opened.sources
        for file in source.files
    }
    return {"plan": key, "jobs": plan.key([]), "inputs": inputs}


def _followed(folder: str) -> str:
    """Where a link to a folder leads: the folder that appears at the end cannot take the link's place."""
    link = folder.rstrip("/")
    return os.path.realpath(link) if not is_remote(folder) and os.path.islink(link) else folder


def check_apart(folder: str, opened: OpenedInputs) -> None:
    """Raises UserError for an output within an input: that stays as it is, and is what it was for whoever copies it."""
    if is_remote(folder):
        return
    for source in opened.sources:
        place = source.located.path
        inside = source.located.kind in ("folder", "checkpoint") and not is_remote(place)
        if inside and Path(place).resolve() in Path(folder).resolve().parents:
            raise UserError(
                f"--out {folder}: lies within the input {source.address}; choose a folder outside"
            )


def existing(folder: str, key: str, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a complete output of the same plan; None where there is no output yet."""
    if not is_remote(folder) and Path(folder).name in ("", ".."):
        raise UserError(f"--out {folder!r}: name the folder that is to be made")
    record = join(folder, RECORD)
    if is_remote(folder):
        there = exists(folder)
    else:
        there = os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder))
    if not there:
        return None
    if not exists(record):
        if is_remote(folder) and half_published(folder, key):
            return None
        raise UserError(
            f"{folder} exists and is not the output of a merge; choose another --out, or remove it"
        )
    try:
        content = json.loads(read_bytes(record))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("output", {}), dict):
        raise UserError(f"{record}: not what a merge writes; choose another --out, or remove {folder}")
    if content.get("plan") != key:
        raise UserError(
            f"{folder} holds another merge{_difference(content.get('asked'), asked)} (see {record}); choose another "
            "--out, or remove it"
        )
    _check_whole(folder, content)
    if is_remote(folder):
        remove([join(folder, MARK)])
    else:
        tidy(Path(folder))
    return content


def _difference(there: Any, asked: Mapping[str, Any]) -> str:
    """What is asked otherwise than it was; where nothing is, the inputs are other ones."""
    there = there if isinstance(there, dict) else {}
    told = {
        key: [json.dumps(one.get(key), default=str) for one in (there, asked)] for key in {**there, **asked}
    }
    other = [f"{key} {was}, not {now}" for key, (was, now) in told.items() if was != now]
    short = [text if len(text) <= 100 else text.partition(" ")[0] for text in other]
    return f": of {'; '.join(short[:3])}" if short else ", or this one of inputs that changed since"


def _check_whole(folder: str, record: Mapping[str, Any]) -> None:
    """Raises UserError where a file of weights is gone or has another size: what is done is not said to be."""
    files = {join(folder, name): entry for name, entry in record.get("output", {}).items()}
    there = sizes(list(files))
    for url, entry in files.items():
        if url not in there or not isinstance(entry, dict) or entry.get("size") != there[url]:
            raise UserError(
                f"{url}: not as this merge wrote it (dromos verify tells more); remove {folder} to merge again"
            )


def _record(output: Output, opened: OpenedInputs, prints: list[dict[str, str]], key: str) -> dict[str, Any]:
    plan, made = output.plan, written(output)
    inputs = [
        {
            "address": source.address,
            "path": source.located.path,
            "step": source.located.step,
            "weight": plan.weights[i] if i < len(plan.weights) else None,
            "files": files,
            "lineage": sorted(ancestors(source)),
            "read": {"tensors": len(made.inputs[i]), "digest": digests.combined_digest(made.inputs[i])},
        }
        for i, (source, files) in enumerate(zip(opened.sources, prints, strict=True))
    ]
    return {
        "plan": key,
        "method": plan.method,
        "theta": f"{THETA[plan.method]}; {ROUNDING}",
        "inputs": inputs,
        "asked": plan.request,
        "mixed": sum(job.why == "mixed" for job in plan.jobs),
        "copied": {job.name: job.why for job in plan.jobs if job.why != "mixed"},
        "left_out": list(plan.left_out),
        "tied": plan.tied,
        "frozen": FROZEN if plan.frozen else None,
        "output": {file.name: {"size": file.size, "digest": made.files[file.name]} for file in plan.files},
        "tensors": made.tensors,
        "overflow": made.overflow,
        "digests": {"tensor": digests.RULE, "file": digests.FILE_RULE, "read": digests.READ_RULE},
        "dromos": _version(),
        "jobs": jobs_plain(plan),
    }


def _version() -> str:
    try:
        return version("dromos")
    except PackageNotFoundError:
        return "unknown"


def _beside(plan: Plan) -> dict[str, bytes | Path]:
    """Content of config, tokenizer, index and the stage that says what the model is; where frozen tensors lie."""
    files: dict[str, bytes | Path] = {name: read_companion(content) for name, content in plan.companions.items()}
    if plan.index is not None:
        files[INDEX] = plan.index
    if plan.frozen is not None:
        files[FROZEN] = plan.frozen
    if plan.stage_dir is not None and (stage := model_stage(plan.stage_dir)) is not None:
        files["resolved.yaml"] = (stage / "resolved.yaml").read_bytes()
    return files


def _add(output: LocalOutput | RemoteOutput, files: Mapping[str, bytes | Path]) -> None:
    """The files beside the weights; frozen tensors are not copied where the disk can give a file a second name."""
    for name, content in files.items():
        if isinstance(output, RemoteOutput):
            output.uploads.add(name, content)
        elif isinstance(content, Path):
            link_or_copy(content, output.folder / name)
        else:
            (output.folder / name).write_bytes(content)
