"""Which files of a folder hold its weights: the same that transformers takes, and clear words where there are none."""

from __future__ import annotations

import re
from typing import Any

from data_pipeline.errors import UserError
from pretrain.weights.folder import WEIGHTS, Folder

FROZEN = "frozen.safetensors"
INDEX = ".index.json"
SINGLE = (
    "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
)  # fmt: skip
ASIDE = (FROZEN, "training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state*.pth")
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)(?P<suffix>\.\w+)")
SCANNED, SHOWN = 100, 3
OTHERS = {
    "*.gguf": "GGUF, whose numbers are quantised for llama.cpp; name the safetensors that it was made from",
    "model_index.json": "a pipeline of diffusers; name one of its parts, such as unet or transformer",
    "*.h5": "weights of TensorFlow; save them as safetensors with transformers",
    "*.msgpack": "weights of Flax; save them as safetensors with transformers",
    "consolidated.*.pth": "Meta's parts by tensor; convert them with transformers first",
}
"""what may stand in a folder instead of weights that can be read"""


def weight_files(folder: Folder, address: str) -> tuple[dict[str, set[str]], list[str]]:
    """File -> the tensors that the index says are in it (none are named where there is no index); and notes.

    Of several forms the one that transformers takes: one file before shards, safetensors before pickles.
    Raises UserError for an index that is none, that names files outside of the folder or absent ones, and for a
    folder of which it is not clear what its weights are.
    """
    for name in SINGLE:
        index = f"{name}{INDEX}"
        if name in folder:
            files = {name: set[str]()}
            shards = _by_index(folder, index) if index in folder else files
            note = f"{folder.url}: {name} is read, as by transformers, and not the shards of {index}"
            return files, [] if shards.keys() == files.keys() else [note]
        if index in folder:
            return _by_index(folder, index), []
    for suffix in (".safetensors", ".bin"):
        indexes = folder.matching(f"*{suffix}{INDEX}")
        if len(indexes) == 1:
            return _by_index(folder, indexes[0]), []
    aside = {*folder.matching(*ASIDE), *ADAPTERS}
    for pattern in WEIGHTS:
        found = [name for name in folder.matching(pattern) if name not in aside]
        if len(found) == 1 and PART.fullmatch(found[0]) is None:
            return {found[0]: set()}, []
        if found and not folder.matching("consolidated.*.pth"):
            return _parts(folder, address, found), []
    raise UserError(_nothing(folder, address))


def _parts(folder: Folder, address: str, found: list[str]) -> dict[str, set[str]]:
    """Shards numbered i-of-N that came without their index, where all are there."""
    parts = [PART.fullmatch(name) for name in found]
    kinds = {(part["stem"], part["count"], part["suffix"]) if part else None for part in parts}
    if kinds == {None} or len(kinds) > 1:
        raise UserError(
            f"{address}: {len(found)} {found[0][found[0].rfind('.') :]} files and no index in {folder.url}; "
            "name one file, or RUN/STAGE"
        )
    there = {int(part["number"]) for part in parts if part}
    count = int(parts[0]["count"]) if parts[0] else 0
    missing = sorted(set(range(1, count + 1)) - there) if count < 1 << 16 else [0]
    if missing:
        raise UserError(
            f"{address}: {len(found)} of {count} shards are in {folder.url}, number {missing[0]} is missing; fetch the "
            "folder again"
        )
    return {name: set() for name in found}


def _nothing(folder: Folder, address: str) -> str:
    if not folder.names and not folder.folders:
        return f"{address}: no safetensors file and no checkpoint, {folder.url} is empty"
    if adapters := [name for name in ADAPTERS if name in folder]:
        return (
            f"{address}: an adapter ({adapters[0]}), not a model; merge it into its base first "
            "(peft: merge_and_unload), then name the result"
        )
    for pattern, what in OTHERS.items():
        if found := folder.matching(pattern):
            return f"{address}: no safetensors file and no checkpoint in {folder.url}; {found[0]}: {what}"
    near = ", ".join(_below(folder))
    advice = f"there are some in {near}" if near else "name one file, or RUN/STAGE"
    return f"{address}: no safetensors file and no checkpoint in {folder.url}; {advice}"


def _below(folder: Folder) -> list[str]:
    """A few folders below that hold weights: a Trainer's checkpoints, a snapshot in the Hub's cache."""
    if folder.remote:
        return []
    found = []
    for name in folder.folders[:SCANNED]:
        try:
            inner = folder.below(name)
            deeper = [inner.below(one) for one in inner.folders[:SCANNED]] if name == "snapshots" else [inner]
        except UserError:  # one that cannot be read
            continue
        found += [one.url for one in deeper if one.matching(*WEIGHTS)]
    return found[-SHOWN:]


def _by_index(folder: Folder, index: str) -> dict[str, set[str]]:
    content = folder.json(index, follow=True)
    where = f"{folder.url}/{index}"
    placed: Any = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise UserError(f"{where}: not an index of weights (no weight_map); fetch the folder again")
    files: dict[str, set[str]] = {}
    for tensor, name in placed.items():
        if not isinstance(name, str) or not name or "/" in name or "\\" in name or name in (".", ".."):
            raise UserError(f"{where}: names {str(name)[:100]!r}, which is no file of this folder")
        if name not in folder:
            raise UserError(f"{where}: names {name[:100]!r}, which is not there; fetch the folder again")
        if not name.endswith((".safetensors", ".bin", ".pt", ".pth")):
            raise UserError(f"{where}: names {name[:100]!r}, which is no file of weights")
        files.setdefault(name, set()).add(tensor)
    return dict(sorted(files.items()))
