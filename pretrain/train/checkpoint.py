"""Checkpoint protocol: write into step_X.tmp, hash, mark COMPLETE, rename, point `latest` at it, delete the oldest.

A reader takes the newest folder that is named step_X and holds COMPLETE. All other folders are incomplete (the process
was killed); the next save removes them.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline.errors import UserError
from data_pipeline.storage.durable import make_folder, sync, write_errors
from data_pipeline.storage.files import publish
from pretrain.distributed.collectives import barrier, from_rank_0, gather, rank, world_size
from pretrain.run.folder import complete_steps, read_mapping, tag_of
from pretrain.run.metrics_log import parse

HASH_BLOCK_BYTES = 1 << 22
# Files of which DeepSpeed writes one per rank, by ZeRO stage; of a model without ZeRO rank 0 alone writes a file.
OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt")
SHARDED_MODEL_FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_\d+_model_states\.pt")
MODEL_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")


def save(
    folder: Path, step: int, state: dict[str, Any], write: Callable[[Path, str], None], keep: int
) -> Path:
    """Write the checkpoint `folder/step_X` and return its path; collective.

    A kill or power cut at any instant leaves the previous checkpoint or this one complete. (A step that is saved again
    is missing for an instant; then the previous one is that of an earlier step.) `write(folder, tag)` writes the files
    of this rank into `folder/tag`. Afterwards each rank flushes and hashes its share of all files. The `keep` newest
    complete checkpoints stay.
    """
    final, tag = folder / tag_of(step), tag_of(step) + ".tmp"
    partial = folder / tag
    # 1. Write: every rank its own files, rank 0 state.json.
    if rank() == 0:
        make_folder(folder)
        leftovers = list(folder.glob("step_*.tmp"))
        if leftovers:
            sync(folder)  # a killed save may have renamed them without that
        for leftover in leftovers:
            shutil.rmtree(leftover)
    barrier()
    with write_errors(partial):
        write(folder, tag)
    if rank() == 0:
        with write_errors(partial / "state.json"):
            (partial / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True))
    barrier()
    # 2. Flush and hash. Rank 0 lists the files: on a shared file system ranks may see different lists.
    names = from_rank_0(sorted(str(p.relative_to(partial)) for p in partial.rglob("*") if p.is_file()))
    parts = gather(
        {name: _size_and_hash(partial / name, flush=True) for name in names[rank() :: world_size()]}
    )
    # 3. Mark complete and rename; only then delete older checkpoints.
    if rank() == 0:
        manifest = {name: entry for part in parts for name, entry in part.items()}
        content = json.dumps(manifest, indent=1, sort_keys=True).encode()
        publish(str(partial / "manifest.json"), content)
        for entry in partial.rglob("*"):
            if entry.is_dir():
                sync(entry)
        # The marker holds the manifest's hash: a manifest that lost entries would verify less than was saved.
        publish(
            str(partial / "COMPLETE"), xxhash.xxh64_hexdigest(content).encode()
        )  # syncs `partial` itself too
        doomed = {_set_aside(final)} if final.exists() else set()
        partial.rename(final)
        sync(folder)
        publish(str(folder / "latest"), final.name.encode())
        doomed |= {_set_aside(folder / tag_of(old)) for old in complete_steps(folder)[:-keep]}
        sync(folder)  # the disk may delete files before it renames their folder, which would look complete
        for each in doomed:
            shutil.rmtree(each)
    barrier()
    return final


def verify_and_read_state(path: Path) -> dict[str, Any]:
    """Check a checkpoint against its manifest and return its `state.json`; collective, each rank hashes its share.

    Raises UserError on every rank, naming a damaged file, or one that the manifest should list and does not.
    """
    manifest = _read_manifest(path)
    damage = None
    for name, entry in sorted(manifest.items())[rank() :: world_size()]:
        file = path / name
        size = file.stat().st_size if file.exists() else None
        if size is None:
            damage = f"{name} is missing"
        elif size != entry["size"]:
            damage = f"{name} has {size} bytes, its manifest says {entry['size']}"
        elif _size_and_hash(file)["xxh64"] != entry["xxh64"]:
            damage = f"{name} is damaged: its hash differs from the manifest"
        if damage:
            break
    damages = [of_rank for of_rank in gather(damage or _unlisted(path, manifest)) if of_rank]
    if damages:
        raise _damaged(path, damages[0])
    advice = f"remove {path.name} to resume from the checkpoint before it"
    state = read_mapping(path / "state.json", advice) or {}
    if damage := damaged_field(state, path.name):
        raise _damaged(path, f"state.json is damaged: {damage}")
    if missing := missing_rank_file(manifest, state):
        raise _damaged(path, f"{missing} is missing, also in manifest.json")
    return state


def damaged_field(state: dict[str, Any], name: str) -> str | None:
    """A sentence about a field of a state.json that the trainer does not write so; None if there is none.

    `name` is the folder name of the checkpoint. The data position, `order`, is not checked here.
    """
    step, line = state.get("step"), state.get("line")
    whole = {
        "step": step is None or (_is_count(step) and tag_of(step) == name),
        "world_size": _is_count(state.get("world_size", 1)) and state.get("world_size") != 0,
        "zero": state.get("zero", 0) in (0, 1, 2, 3) and _is_count(state.get("zero", 0)),
        "skipped_in_a_row": _is_count(state.get("skipped_in_a_row", 0)),
        "frozen": isinstance(state.get("frozen", ""), str | None),
        "line": line is None or (isinstance(line, str) and parse(line.encode()) is not None),
        "replaced": _all_of(
            state.get("replaced", {}), lambda window: isinstance(window, list) and all(map(_is_pair, window))
        ),
        "bad_shards": _all_of(state.get("bad_shards", {}), _is_pair),
    }
    key = next((key for key, is_whole in whole.items() if not is_whole), None)
    return None if key is None else f"{key} is {reprlib.repr(state[key])}"


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))


def _all_of(value: Any, is_whole: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(is_whole, value.values()))


def missing_rank_file(names: Iterable[str], state: dict[str, Any]) -> str | None:
    """Description of a file that DeepSpeed writes and that is not in `names`; None if there is one of every rank.

    `state` is the state.json of the checkpoint, with `world_size` and the ZeRO stage `zero`; without them nothing is
    expected.
    """
    zero, world = state.get("zero"), state.get("world_size")
    if zero is None or world is None:
        return None
    expected = [(MODEL_FILE, 1, "*_model_states.pt")] if zero < 3 else []
    if zero:
        expected.append((OPTIMIZER_FILE, world, "*_optim_states.pt"))
    if zero == 3:
        expected.append((SHARDED_MODEL_FILE, world, "*_model_states.pt"))
    names = list(names)
    for pattern, ranks, kind in expected:
        found = {int(match[1]) for name in names if (match := pattern.fullmatch(name))}
        for number in range(ranks):
            if number not in found:
                return f"{kind} of rank {number}"
    return None


def hash_file(path: Path) -> str | None:
    """xxh64 of a file as 16 hex digits; None when the file does not exist."""
    return _size_and_hash(path)["xxh64"] if path.exists() else None


def _size_and_hash(path: Path, flush: bool = False) -> dict[str, Any]:
    """Size and xxh64 of a file; `flush` writes it to disk (fsync)."""
    digest = xxhash.xxh64()
    with open(path, "rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
        if flush:
            with write_errors(path):
                os.fsync(file.fileno())
    return {"size": path.stat().st_size, "xxh64": digest.hexdigest()}


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest's content. Raises UserError if it is missing, damaged, or not the one that was saved.

    COMPLETE holds its hash; that of a checkpoint of an earlier version is empty.
    """
    try:
        content = (path / "manifest.json").read_bytes()
        seal = (path / "COMPLETE").read_text()
        manifest = json.loads(content)
        is_whole = not seal or seal == xxhash.xxh64_hexdigest(content)
        if is_whole and all(
            isinstance(entry, dict) and {"size", "xxh64"} <= set(entry) for entry in manifest.values()
        ):
            return manifest
    except (FileNotFoundError, ValueError, AttributeError, RecursionError):
        pass
    raise _damaged(path, "manifest.json is missing or damaged")


def _unlisted(path: Path, manifest: dict[str, Any]) -> str | None:
    """A sentence about a file that would be loaded although the manifest does not list it; None if there is none."""
    loaded = ["state.json", *sorted(str(file.relative_to(path)) for file in path.rglob("*.pt"))]
    return next((f"{name} is not listed in manifest.json" for name in loaded if name not in manifest), None)


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"checkpoint {path}: {reason}. Remove {path.name} to resume from the checkpoint before it."
    )


def _set_aside(path: Path) -> Path:
    """Rename a checkpoint that is to be deleted, so that a kill half-way leaves nothing that looks complete."""
    doomed = path.with_name(path.name + ".old.tmp")  # not step_X.tmp, into which the same step may be written
    if doomed.exists():
        shutil.rmtree(doomed)
    return path.rename(doomed)
