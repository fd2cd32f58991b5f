"""Whether the output of a merge is what was written, whole, and what its inputs give; nothing is written."""

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
from pretrain.merge.vocabulary.align import EMBEDDING
from pretrain.weights.dtypes import TensorInfo
from pretrain.weights.folder import FROZEN, Folder
from pretrain.weights.formats.safetensors_file import SafetensorsFile
from pretrain.weights.source import WeightSource

CHUNKS = 32


def open_output(url: str) -> tuple[Folder, dict[str, Any]]:
    """The folder and its merge.json. Raises UserError where it is not the output of a merge."""
    try:
        folder = Folder(url)
    except UserError:
        raise UserError(
            f"{url}: no such folder, so no {RECORD}; name the folder that dromos merge wrote"
        ) from None
    if RECORD not in folder:
        if swept := [name for name in folder.folders if name.startswith("beta-")]:
            raise UserError(f"{url}: a sweep; name one of its outputs, such as {join(url, swept[0])}")
        raise UserError(f"{url}: no {RECORD} in it; name the folder that dromos merge wrote")
    content = folder.json(RECORD)
    if not isinstance(content, dict) or not {"plan", "inputs", "output"} <= set(content):
        raise UserError(f"{folder.url}/{RECORD}: not what a merge writes")
    return folder, content


def weight_bytes(url: str) -> int:
    """Of the weights in a folder: what `verify` reads of it at least. 0 where it is none."""
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
    """Check the output of a merge against its merge.json, and `count` random chunks of it against its inputs.

    folder:   on a disk or in a store.
    full:     all of the inputs is read again, and everything is computed again.
    progress: is told the bytes that are checked.
    Raises UserError where `folder` is not the output of a merge, ReadError where a store does not answer.
    """
    report = Report(str(folder))
    opened, record = open_output(report.folder)
    try:
        jobs = jobs_of(record)
        _check_all(report, opened, record, jobs, None if full else count, seed, threads, progress)
    except UserError as error:
        report.add("wrong", str(error))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        report.add("wrong", f"{RECORD}: not as it was written ({error!r})")
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
    if is_sealed(record):
        report.add("good", f"{RECORD} is as it was written")
    else:
        report.add("wrong", f"{RECORD} was edited: its seal is of other content")
    sound: dict[str, SafetensorsFile] = {}
    held: dict[str, TensorInfo] = {}
    places: dict[str, str] = {}
    with Workers([], threads=threads) as workers:
        for name, entry in record["output"].items():
            file = open_file(report, folder, name, entry)
            if file is None:
                continue
            held |= {tensor: file.info(tensor) for tensor in file.names()}
            places |= dict.fromkeys(file.names(), name)
            if check_file(report, name, file, entry, record, workers, progress):
                sound[name] = file
        if len(sound) == len(record["output"]):
            report.add(
                "good", f"{len(held)} tensors in {_counted(len(sound), 'file')} are as they were written"
            )
        _check_finite(report, {job.name: job for _, job in jobs}, record.get("overflow") or {})
        _check_places(report, folder, record, jobs, held, places)
        _check_beside(report, folder, record)
        _check_config(report, folder, held)
        _check_inputs(report, record, jobs, sound, count, seed, workers, threads, progress)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _check_finite(report: Report, jobs: Mapping[str, TensorJob], overflow: Mapping[str, int]) -> None:
    for name, (nan, inf) in report.not_finite.items():
        copied = name in jobs and jobs[name].copy
        text = f"{name}: {nan:,} NaN, {inf:,} infinite" + (", copied from its input" if copied else "")
        if name in overflow and name in jobs:
            text += f"; the merge made {overflow[name]:,} of them, too large for {jobs[name].dtype}"
        report.add("note" if copied else "wrong", text)
    if not report.not_finite:
        report.add("good", "no NaN, nothing infinite")


def _check_places(
    report: Report,
    folder: Folder,
    record: Mapping[str, Any],
    jobs: list[tuple[str, TensorJob]],
    held: Mapping[str, TensorInfo],
    places: Mapping[str, str],
) -> None:
    """Every tensor in its file, in its shape; the index says so too; ties lead to something."""
    for file, job in jobs:
        if job.name not in held:
            report.add("wrong", f"{job.name}: not there; it was written to {file}")
        elif held[job.name] != (job.dtype, job.shape) or places[job.name] != file:
            dtype, shape = held[job.name]
            report.add(
                "wrong",
                f"{job.name}: {dtype} {list(shape)} in {places[job.name]}, "
                f"planned was {job.dtype} {list(job.shape)} in {file}",
            )
    if len(record["output"]) > 1 or INDEX in folder:
        index = _json(folder, INDEX)
        placed = index.get("weight_map") if isinstance(index, dict) else None
        if placed != dict(places):
            report.add("wrong", f"{INDEX}: missing, or it does not say where the tensors are")
    frozen = record.get("frozen")
    for alias, name in (record.get("tied") or {}).items():
        if name not in held and not frozen:
            report.add("wrong", f"{alias}: tied to {name}, which is not there")
    if frozen and FROZEN not in folder:
        report.add("wrong", f"{FROZEN}: not there")
    for name in folder.matching("*.safetensors"):
        if name not in record["output"] and name != frozen:
            report.add("note", f"{name}: not of this merge")


def _json(folder: Folder, name: str) -> Any:
    """None where it is not there, or is no JSON."""
    try:
        return folder.json(name) if name in folder else None
    except UserError:
        return None


def _check_beside(report: Report, folder: Folder, record: Mapping[str, Any]) -> None:
    """Config, tokenizer and the like against the digests that they were written with."""
    beside = record.get("beside", {})
    if not isinstance(beside, dict):
        report.add("wrong", f"{RECORD}: beside is no list of files")
        return
    changed = [name for name, digest in beside.items() if _digest_of(folder, name) != digest]
    for name in changed:
        report.add("wrong", f"{name}: gone, or not as it was written")
    if beside and not changed:
        report.add("good", f"{len(beside)} files beside the weights are as they were written")


def _digest_of(folder: Folder, name: str) -> str | None:
    """xxh64 of a file of this folder; None where it is none of it."""
    try:
        return xxhash.xxh64_hexdigest(folder.bytes(name)) if name in folder else None
    except UserError:
        return None


def _check_config(report: Report, folder: Folder, held: Mapping[str, TensorInfo]) -> None:
    """What config.json says of sizes, where it is the same in all models: vocabulary, width, number of layers."""
    try:
        config: Any = folder.json("config.json") if "config.json" in folder else {}
    except UserError:
        report.add("wrong", "config.json: not JSON")
        return
    if not isinstance(config, dict):
        return
    inner = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    embeddings = [
        (name, shape) for name, (_, shape) in held.items() if EMBEDDING.search(name) and len(shape) == 2
    ]
    checked = []
    if len(embeddings) == 1:
        name, shape = embeddings[0]
        narrower = any(key in inner for key in ("embedding_size", "word_embed_proj_dim"))
        for key, size in (("vocab_size", shape[0]), ("hidden_size", None if narrower else shape[1])):
            if isinstance(inner.get(key), int) and size is not None:
                checked.append(key)
                if inner[key] != size:
                    report.add("wrong", f"config.json: {key} {inner[key]}, but {name} is {list(shape)}")
    layers: dict[str, set[int]] = {}
    for place in places_of(list(held)).values():
        if place.layer is not None:
            layers.setdefault(place.stack, set()).add(place.layer)
    wanted = inner.get("num_hidden_layers")
    if isinstance(wanted, int) and layers and wanted > 1:
        checked.append("num_hidden_layers")
        if max(map(len, layers.values())) < wanted:
            report.add("wrong", f"config.json: {wanted} layers, there are {max(map(len, layers.values()))}")
    if checked and not any(f.text.startswith("config.json") for f in report.findings):
        report.add("good", f"config.json fits the tensors ({', '.join(checked)})")


def _check_inputs(
    report: Report,
    record: Mapping[str, Any],
    jobs: list[tuple[str, TensorJob]],
    sound: Mapping[str, SafetensorsFile],
    count: int | None,
    seed: int,
    workers: Workers,
    threads: int | None,
    progress: Progress | None,
) -> None:
    """Whether the inputs are what they were, and give what stands in the files."""
    sources, states = open_inputs_of(record)
    everything = [job for _, job in jobs]
    for number, (entry, (state, why)) in enumerate(zip(record["inputs"], states, strict=True)):
        source = sources[number]
        if count is None and source is not None and _other_reads(number, source, everything, entry, workers):
            state, why, sources[number] = CHANGED, "some bytes of what was read", None
        report.inputs.append((entry["address"], state))
        level: Level = {UNCHANGED: "good", CHANGED: "wrong"}.get(state, "note")  # type: ignore[assignment]
        said = f"{letter(number)} ({entry['address']}): {state}" + (f": {why}" if why else "")
        report.add(level, said)
    there = [(file, job) for file, job in jobs if file in sound]
    report.recomputed, wrong = differing(sound, there, sources, count, seed, threads, progress)
    for text in wrong:
        report.add("wrong", f"computed again, other bytes: {text}")
    if report.recomputed and not wrong:
        report.add("good", f"{report.recomputed:,} chunks computed again from the inputs: the same bytes")
    elif not report.recomputed and count != 0:
        why = "" if sound else ": no file of weights is as it was written"
        report.add("note", f"nothing could be computed again from the inputs{why}")


def _other_reads(
    number: int,
    source: WeightSource,
    jobs: list[TensorJob],
    entry: Mapping[str, Any],
    workers: Workers,
) -> bool:
    known = entry.get("read") or {}
    return bool(known.get("tensors")) and read_digest(number, source, jobs, workers) != known.get("digest")
