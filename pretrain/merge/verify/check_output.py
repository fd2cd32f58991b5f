"""`dromos verify`: checks that an output is complete and unchanged, and that its inputs reproduce it.

Everything is compared with merge.json: sizes and digests of files, tensors and their places, config.json, the state of
the inputs, and random chunks that are recomputed from the inputs. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline.errors import UserError
from data_pipeline.storage.files import join, sizes
from pretrain.merge.diff.compare import places_of
from pretrain.merge.merge_plan import TensorJob, letter
from pretrain.merge.methods.blocks import Workers
from pretrain.merge.output.record import RECORD, is_sealed, jobs_of
from pretrain.merge.planning.output_layout import INDEX
from pretrain.merge.verify.check_weights import Level, Report, check_file, open_file
from pretrain.merge.verify.recompute import (
    CHANGED,
    UNCHANGED,
    Progress,
    differing,
    open_inputs_of,
    read_digest,
)
from pretrain.merge.vocabulary.align import EMBEDDING, tokens_without_rows
from pretrain.weights.companions import companions_of
from pretrain.weights.dtypes import TensorInfo
from pretrain.weights.folder import FROZEN, Folder
from pretrain.weights.formats.safetensors_file import SafetensorsFile
from pretrain.weights.source import WeightSource
from pretrain.weights.unusable import empty_problem

CHUNKS = 32  # recomputed chunks by default


def open_output(url: str) -> tuple[Folder, dict[str, Any]]:
    """The folder and its merge.json. Raises UserError if it is not the output of a merge."""
    try:
        folder = Folder(url)
    except UserError:
        raise UserError(
            f"{url}: no such folder, so no {RECORD}; name a folder that dromos merge wrote"
        ) from None
    if RECORD not in folder:
        if outputs := [name for name in folder.folders if name.startswith("beta-")]:
            raise UserError(f"{url}: a sweep; name one of its outputs, such as {join(url, outputs[0])}")
        raise UserError(f"{url}: no {RECORD} in it; name a folder that dromos merge wrote")
    content = folder.json(RECORD)
    if not isinstance(content, dict) or not {"plan", "inputs", "output"} <= set(content):
        raise UserError(f"{folder.url}/{RECORD}: not written by dromos merge")
    return folder, content


def weight_bytes(url: str) -> int:
    """Bytes of the weight files in a folder, which `verify` reads; 0 if there is no such folder."""
    try:
        folder = Folder(url)
    except UserError:
        return 0
    return sum(sizes([join(folder.url, name) for name in folder.matching("*.safetensors")]).values())


def verify(
    folder: Path | str,
    *,
    count: int = CHUNKS,
    full: bool = False,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check the output of a merge against its merge.json, and recompute `count` random chunks from its inputs.

    folder:   on a disk or in a store.
    full:     read the inputs completely, and recompute everything.
    seed:     of the random chunks.
    progress: receives numbers of checked bytes.

    Raises UserError if `folder` is not the output of a merge, ReadError if a store does not answer.
    """
    report = Report(str(folder))
    opened, record = open_output(report.folder)
    try:
        jobs = jobs_of(record)
        _check_all(report, opened, record, jobs, None if full else count, seed, threads, progress)
    except UserError as error:
        report.add("wrong", str(error))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        report.add("wrong", f"{RECORD}: its content is not valid ({error!r})")
    return report


def _check_all(
    report: Report,
    folder: Folder,
    record: Mapping[str, Any],
    jobs: list[tuple[str, TensorJob]],
    count: int | None,
    seed: int,
    threads: int | None,
    progress: Progress | None,
) -> None:
    # 1. merge.json itself.
    if is_sealed(record):
        report.add("good", f"{RECORD}: unchanged")
    else:
        report.add("wrong", f"{RECORD} was edited: its content does not match its seal")

    intact: dict[str, SafetensorsFile] = {}
    tensors: dict[str, TensorInfo] = {}
    files: dict[str, str] = {}
    with Workers([], threads=threads) as workers:
        # 2. The weight files.
        for name, entry in record["output"].items():
            file = open_file(report, folder, name, entry)
            if file is None:
                continue
            tensors |= {tensor: file.info(tensor) for tensor in file.names()}
            files |= dict.fromkeys(file.names(), name)
            if check_file(report, name, file, entry, record, workers, progress):
                intact[name] = file
        if len(intact) == len(record["output"]):
            report.add("good", f"{len(tensors)} tensors in {_counted(len(intact), 'file')}: unchanged")
        _check_finite(report, {job.name: job for _, job in jobs}, record.get("overflow") or {})
        _check_places(report, folder, record, jobs, tensors, files)
        if (empty := empty_problem(tensors)) is not None:
            report.add("wrong", empty)

        # 3. The other files.
        changed = _check_other_files(report, folder, record)
        _check_config(report, folder, tensors, "config.json" in changed)
        _check_tokens(report, folder, record, tensors)

        # 4. The inputs, and chunks that are recomputed from them.
        _check_inputs(report, record, jobs, intact, count, seed, workers, threads, progress)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _check_finite(report: Report, jobs: Mapping[str, TensorJob], overflow: Mapping[str, int]) -> None:
    """Report NaN and infinities: as wrong, or as a note if they were copied from an input."""
    for name, (nan, inf) in report.not_finite.items():
        copied = name in jobs and jobs[name].copy
        text = f"{name}: {nan:,} NaN, {inf:,} infinite" + (", copied from its input" if copied else "")
        if name in overflow and name in jobs:
            text += f"; {overflow[name]:,} of them come from the merge, too large for {jobs[name].dtype}"
        report.add("note" if copied else "wrong", text)
    if not report.not_finite:
        report.add("good", "no NaN, no infinity")


def _check_places(
    report: Report,
    folder: Folder,
    record: Mapping[str, Any],
    jobs: list[tuple[str, TensorJob]],
    tensors: Mapping[str, TensorInfo],
    files: Mapping[str, str],
) -> None:
    """Check that every tensor is in its file with its dtype and shape, the index, and the targets of tied names."""
    for file, job in jobs:
        if job.name not in tensors:
            report.add("wrong", f"{job.name}: missing; the merge wrote it to {file}")
        elif tensors[job.name] != (job.dtype, job.shape) or files[job.name] != file:
            dtype, shape = tensors[job.name]
            report.add(
                "wrong",
                f"{job.name}: {dtype} {list(shape)} in {files[job.name]}, "
                f"but the merge wrote {job.dtype} {list(job.shape)} to {file}",
            )
    if len(record["output"]) > 1 or INDEX in folder:
        index = _json(folder, INDEX)
        placed = index.get("weight_map") if isinstance(index, dict) else None
        if placed != dict(files):
            report.add("wrong", f"{INDEX}: missing, or it lists other tensors or files")
    frozen = record.get("frozen")
    for alias, name in (record.get("tied") or {}).items():
        if name not in tensors and not frozen:
            report.add("wrong", f"{alias}: tied to {name}, which is missing")
    if frozen and FROZEN not in folder:
        report.add("wrong", f"{FROZEN}: missing")
    for name in folder.matching("*.safetensors"):
        if name not in record["output"] and name != frozen:
            report.add("note", f"{name}: not part of this merge")


def _json(folder: Folder, name: str) -> Any:
    """The content of a JSON file; None if it is missing or not JSON."""
    try:
        return folder.json(name) if name in folder else None
    except UserError:
        return None


def _check_other_files(report: Report, folder: Folder, record: Mapping[str, Any]) -> list[str]:
    """Compare config, tokenizer and the like with the digests in merge.json; returns the names of changed files."""
    digests = record.get("beside", {})
    if not isinstance(digests, dict):
        report.add("wrong", f'{RECORD}: "beside" is not a table of files')
        return []
    changed = [name for name, digest in digests.items() if _digest_of(folder, name) != digest]
    for name in changed:
        report.add("wrong", f"{name}: missing, or changed since it was written")
    if digests and not changed:
        report.add("good", f"{_counted(len(digests), 'other file')}: unchanged")
    return changed


def _digest_of(folder: Folder, name: str) -> str | None:
    """xxh64 of a file in the folder; None if it is missing or cannot be read."""
    try:
        return xxhash.xxh64_hexdigest(folder.bytes(name)) if name in folder else None
    except UserError:
        return None


def _check_config(report: Report, folder: Folder, tensors: Mapping[str, TensorInfo], changed: bool) -> None:
    """Compare sizes in config.json with the tensors, by keys that mean the same in all models.

    These are the vocabulary, the width and the number of layers. `changed`: the file is already reported as changed,
    so a match is not reported as good.
    """
    try:
        config: Any = folder.json("config.json") if "config.json" in folder else {}
    except UserError:
        report.add("wrong", "config.json: not valid JSON")
        return
    if not isinstance(config, dict):
        return
    inner = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    checked: list[str] = []
    mismatches = [*_size_mismatches(inner, tensors, checked), *_layer_mismatches(inner, tensors, checked)]
    for text in mismatches:
        report.add("wrong", f"config.json: {text}")
    if checked and not changed and not mismatches:
        report.add("good", f"config.json matches the tensors ({', '.join(checked)})")


def _check_tokens(
    report: Report, folder: Folder, record: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> None:
    """Check that every token has an embedding row; only a note if the tokenizer is that of an input, unchanged."""
    try:
        beyond = tokens_without_rows(companions_of(folder)[0], tensors, folder.url)
    except UserError as error:
        report.add("wrong", str(error))
        return
    if beyond is not None:
        request = record.get("asked") or {}
        ruled = request.get("vocabulary") or (request.get("mergekit") or {}).get("tokenizer_source")
        report.add("wrong" if ruled else "note", beyond)


def _size_mismatches(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], checked: list[str]
) -> list[str]:
    """vocab_size and hidden_size against the embedding, if there is one; adds the compared keys to `checked`."""
    embeddings = [
        (name, shape) for name, (_, shape) in tensors.items() if EMBEDDING.search(name) and len(shape) == 2
    ]
    if len(embeddings) != 1:
        return []
    mismatches = []
    name, shape = embeddings[0]
    # Models with these keys have embeddings of another width than their layers.
    own_width = any(key in config for key in ("embedding_size", "word_embed_proj_dim"))
    for key, size in (("vocab_size", shape[0]), ("hidden_size", None if own_width else shape[1])):
        if isinstance(config.get(key), int) and size is not None:
            checked.append(key)
            if config[key] != size:
                mismatches.append(f"{key} {config[key]}, but {name} is {list(shape)}")
    return mismatches


def _layer_mismatches(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], checked: list[str]
) -> list[str]:
    """num_hidden_layers against the longest stack of layers; adds the key to `checked` if it was compared."""
    layers: dict[str, set[int]] = {}
    for place in places_of(list(tensors)).values():
        if place.layer is not None:
            layers.setdefault(place.stack, set()).add(place.layer)
    expected = config.get("num_hidden_layers")
    if not isinstance(expected, int) or not layers or expected <= 1:
        return []
    checked.append("num_hidden_layers")
    longest = max(map(len, layers.values()))
    return [f"{expected} layers, but the weights have {longest}"] if longest < expected else []


def _check_inputs(
    report: Report,
    record: Mapping[str, Any],
    jobs: list[tuple[str, TensorJob]],
    intact: Mapping[str, SafetensorsFile],
    count: int | None,
    seed: int,
    workers: Workers,
    threads: int | None,
    progress: Progress | None,
) -> None:
    """Check that the inputs are unchanged, and that they reproduce the bytes of the intact files."""
    sources, states = open_inputs_of(record)
    all_jobs = [job for _, job in jobs]
    for number, (entry, (state, reason)) in enumerate(zip(record["inputs"], states, strict=True)):
        source = sources[number]
        if count is None and source is not None and _reads_changed(number, source, all_jobs, entry, workers):
            state, reason, sources[number] = CHANGED, "some bytes that the merge read", None
        report.inputs.append((entry["address"], state))
        level: Level = {UNCHANGED: "good", CHANGED: "wrong"}.get(state, "note")  # type: ignore[assignment]
        text = f"{letter(number)} ({entry['address']}): {state}" + (f": {reason}" if reason else "")
        report.add(level, text)
    intact_jobs = [(file, job) for file, job in jobs if file in intact]
    report.recomputed, differences = differing(intact, intact_jobs, sources, count, seed, threads, progress)
    for text in differences:
        report.add("wrong", f"recomputed bytes differ: {text}")
    if report.recomputed and not differences:
        report.add("good", f"{report.recomputed:,} chunks recomputed from the inputs: identical bytes")
    elif not report.recomputed and count != 0:
        cause = "" if intact else ": no weight file is intact"
        report.add("note", f"nothing could be recomputed from the inputs{cause}")


def _reads_changed(
    number: int,
    source: WeightSource,
    jobs: list[TensorJob],
    entry: Mapping[str, Any],
    workers: Workers,
) -> bool:
    """True if the tensors that the merge read have another digest now. False if merge.json records none."""
    known = entry.get("read") or {}
    return bool(known.get("tensors")) and read_digest(number, source, jobs, workers) != known.get("digest")
