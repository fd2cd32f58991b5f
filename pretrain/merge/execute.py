"""Executes merges: opens the inputs, plans, writes, records and publishes the output folders.

A killed merge resumes: into a folder from its journal, into an object store from the parts that were sent.
"""

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
from pretrain.merge.output.writer import Output, Progress, output_digests, write_tensors
from pretrain.merge.planning.describe import ROUNDING, THETA
from pretrain.merge.planning.inputs import OpenedInputs
from pretrain.merge.planning.lineage import ancestors
from pretrain.merge.planning.output_layout import INDEX
from pretrain.merge.planning.planner import prepare
from pretrain.merge.planning.request import make_request
from pretrain.run.address import model_stage
from pretrain.weights import digests
from pretrain.weights.companions import read_companion
from pretrain.weights.dtypes import ELEMENTS_PER_BLOCK
from pretrain.weights.folder import FROZEN

OTHER_OPEN_FILES = 200  # allowance for open files that are not outputs


def plan(inputs: Sequence[str], *, run_dir: Path | None = None, **options: Any) -> Plan:
    """The plan that `merge` would execute with the same arguments; writes nothing."""
    return prepare(make_request(inputs, **options), run_dir=run_dir)[0][0]


def merge(
    inputs: Sequence[str],
    out: Path | str,
    *,
    run_dir: Path | None = None,
    chunk: int = ELEMENTS_PER_BLOCK,
    threads: int | None = None,
    progress: Progress | None = None,
    durable: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Merge `inputs` into the folder `out`, which appears only when it is complete.

    inputs:   two or more addresses (pretrain.run.address).
    run_dir:  run folder that relative addresses refer to.
    chunk:    elements per block.
    progress: called with the number of output bytes that were just completed.
    durable:  fsync the weights before `out` appears, see `execute`.
    options:  of `pretrain.merge.planning.request.make_request`: method, beta or weights, base, only, rules, copy_rest,
              dtype, ... For two inputs, beta is the weight of the first: theta = beta * A + (1 - beta) * B.

    Returns the content of `out/merge.json`. Does nothing if `out` is already complete for the same plan; raises
    UserError if it holds anything else.
    """
    plans, opened = prepare(make_request(inputs, **options), run_dir=run_dir)
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
    discard_unfinished: bool = False,
) -> list[dict[str, Any]]:
    """Execute plans that differ only in their weights, in one pass over the inputs; returns their merge.json contents.

    Complete outputs are skipped, unfinished ones are resumed. For a folder in an object store, elements are computed
    again but parts that were sent before a kill are not sent again.

    folders:            output folder of each plan.
    durable:            fsync the weights before a folder appears, so that it survives a power cut. Without it, the
                        kernel writes them later, and damage shows in the digests of merge.json.
    discard_unfinished: delete an unfinished output of other inputs or another plan instead of raising UserError.
    """
    folders = [_resolve_link(str(folder)) for folder in folders]
    hashes = [source.hashes() for source in opened.sources]
    keys = [plan.key(hashes) for plan in plans]
    for out in folders:
        check_outside_inputs(str(out), opened)
    records = [
        existing_record(str(o), key, p.request) for o, key, p in zip(folders, keys, plans, strict=True)
    ]
    missing = [i for i, record in enumerate(records) if record is None]
    _raise_open_file_limit(OTHER_OPEN_FILES + sum(len(plans[i].files) + 2 for i in missing))
    with ExitStack() as stack:
        outputs: dict[int, LocalOutput | RemoteOutput] = {}
        for i in missing:
            if is_remote(str(folders[i])):
                folder = uploaded_folder(str(folders[i]), keys[i], len(folders))
                uploads = stack.enter_context(folder)
                outputs[i] = RemoteOutput(plans[i], uploads)
            else:
                head = _head(plans[i], opened, hashes, keys[i])
                resumed = resumed_folder(Path(folders[i]), head, plans[i].size, durable, discard_unfinished)
                outputs[i] = LocalOutput(plans[i], *stack.enter_context(resumed))
        if missing:
            write_tensors(list(outputs.values()), opened.sources, chunk, threads, progress)
            _check_unchanged(opened)
        for i, output in outputs.items():
            files = _companion_files(plans[i])
            companion_digests = {
                n: xxhash.xxh64_hexdigest(c) for n, c in files.items() if isinstance(c, bytes)
            }
            records[i] = record = sealed(
                _record(output, opened, hashes, keys[i]) | {"beside": companion_digests}
            )
            files |= {model_card.NAME: model_card.card(plans[i], opened.sources, record)}
            # merge.json comes last: in an object store it marks a complete output.
            _add_files(output, files | {RECORD: (json.dumps(record, indent=1) + "\n").encode()})
    return [record for record in records if record is not None]


def _check_unchanged(opened: OpenedInputs) -> None:
    """Raises UserError if a memory-mapped input file changed after the check that precedes every read."""
    for file in (file for source in opened.sources for file in source.files):
        if not file.remote:
            file.check_unchanged()


def _raise_open_file_limit(files: int) -> None:
    """Raise the process's limit of open files for a sweep over many betas. Raises UserError above the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or files <= soft:
        return
    if hard != resource.RLIM_INFINITY and files > hard:
        raise UserError(
            f"{files:,} files would be open at once, and the limit is {hard:,}; write fewer outputs at a time, or "
            "raise the limit (ulimit -n)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))


def _head(plan: Plan, opened: OpenedInputs, hashes: list[dict[str, str]], key: str) -> dict[str, Any]:
    """First line of a journal: the plan's key, the key of its jobs, and the identity of every input file."""
    inputs = {
        f"{source.address}: {Path(file.name).name}": file.identity
        for source in opened.sources
        for file in source.files
    }
    return {"plan": key, "jobs": plan.key([]), "inputs": inputs}


def _resolve_link(folder: str) -> str:
    """The target of `folder` if it is a symbolic link, because a folder cannot be renamed onto a link."""
    link = folder.rstrip("/")
    return os.path.realpath(link) if not is_remote(folder) and os.path.islink(link) else folder


def check_outside_inputs(folder: str, opened: OpenedInputs) -> None:
    """Raises UserError if the output is inside an input folder, which a merge must not change."""
    if is_remote(folder):
        return
    for source in opened.sources:
        path = source.located.path
        inside = source.located.kind in ("folder", "checkpoint") and not is_remote(path)
        if inside and Path(path).resolve() in Path(folder).resolve().parents:
            raise UserError(
                f"--out {folder}: is inside the input {source.address}; choose a folder outside it"
            )


def existing_record(folder: str, key: str, requested: Mapping[str, Any]) -> dict[str, Any] | None:
    """The merge.json of a complete output of the same plan; None if there is no output yet.

    Raises UserError if `folder` holds anything else, or if weight files of the output are missing.
    """
    if not is_remote(folder) and Path(folder).name in ("", ".."):
        raise UserError(f"--out {folder!r}: give the name of a folder to create")
    record = join(folder, RECORD)
    if is_remote(folder):
        present = exists(folder)
    else:
        present = os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder))
    if not present:
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
        raise UserError(f"{record}: is not a merge.json of Dromos; choose another --out, or remove {folder}")
    if content.get("plan") != key:
        raise UserError(
            f"{folder} has another merge{_difference(content.get('asked'), requested)} (see {record}); choose another "
            "--out, or remove it"
        )
    _check_weight_files(folder, content)
    if is_remote(folder):
        remove([join(folder, MARK)])
    else:
        tidy(Path(folder))
    return content


def _difference(recorded: Any, requested: Mapping[str, Any]) -> str:
    """Describe up to three options that differ from the recorded ones; if none differs, the inputs changed."""
    recorded = recorded if isinstance(recorded, dict) else {}
    values = {
        key: [json.dumps(options.get(key), default=str) for options in (recorded, requested)]
        for key in {**recorded, **requested}
    }
    changes = [f"{key} {was}, not {now}" for key, (was, now) in values.items() if was != now]
    short = [text if len(text) <= 100 else text.partition(" ")[0] for text in changes]
    return f" with {'; '.join(short[:3])}" if short else ", or the inputs changed since"


def _check_weight_files(folder: str, record: Mapping[str, Any]) -> None:
    """Raises UserError if a weight file is missing or has another size than merge.json says."""
    files = {join(folder, name): entry for name, entry in record.get("output", {}).items()}
    present = sizes(list(files))
    for url, entry in files.items():
        if url not in present or not isinstance(entry, dict) or entry.get("size") != present[url]:
            raise UserError(
                f"{url}: is missing or has another size than this merge wrote (see dromos verify); remove {folder} "
                "to merge again"
            )


def _record(output: Output, opened: OpenedInputs, hashes: list[dict[str, str]], key: str) -> dict[str, Any]:
    plan, written = output.plan, output_digests(output)
    inputs = [
        {
            "address": source.address,
            "path": source.located.path,
            "step": source.located.step,
            "key": source.key,
            "renamed": source.renamed,
            "weight": plan.weights[i] if i < len(plan.weights) else None,
            "files": files,
            "lineage": sorted(ancestors(source)),
            "read": {"tensors": len(written.inputs[i]), "digest": digests.combined_digest(written.inputs[i])},
        }
        for i, (source, files) in enumerate(zip(opened.sources, hashes, strict=True))
    ]
    return {
        "plan": key,
        "method": plan.method,
        "theta": f"{THETA[plan.method]}; {ROUNDING}",
        "inputs": inputs,
        "asked": plan.request,
        "mixed": sum(job.treatment == "mixed" for job in plan.jobs),
        "copied": {job.name: job.treatment for job in plan.jobs if job.treatment != "mixed"},
        "left_out": list(plan.left_out),
        "tied": plan.tied,
        "frozen": FROZEN if plan.frozen else None,
        "output": {file.name: {"size": file.size, "digest": written.files[file.name]} for file in plan.files},
        "tensors": written.tensors,
        "overflow": written.overflow,
        "digests": {"tensor": digests.RULE, "file": digests.FILE_RULE, "read": digests.READ_RULE},
        "dromos": _version(),
        "jobs": jobs_plain(plan),
    }


def _version() -> str:
    try:
        return version("dromos")
    except PackageNotFoundError:
        return "unknown"


def _companion_files(plan: Plan) -> dict[str, bytes | Path]:
    """File name -> content of config, tokenizer, index and the stage's resolved.yaml.

    frozen.safetensors is a path instead of its content, so that it can be linked.
    """
    files: dict[str, bytes | Path] = {
        name: read_companion(content) for name, content in plan.companions.items()
    }
    if plan.index is not None:
        files[INDEX] = plan.index
    if plan.frozen is not None:
        files[FROZEN] = plan.frozen
    if plan.stage_dir is not None and (stage := model_stage(plan.stage_dir)) is not None:
        files["resolved.yaml"] = (stage / "resolved.yaml").read_bytes()
    return files


def _add_files(output: LocalOutput | RemoteOutput, files: Mapping[str, bytes | Path]) -> None:
    """Write the files beside the weights; a path is hard-linked if possible, else copied."""
    for name, content in files.items():
        if isinstance(output, RemoteOutput):
            output.uploads.add(name, content)
        elif isinstance(content, Path):
            link_or_copy(content, output.folder / name)
        else:
            (output.folder / name).write_bytes(content)
