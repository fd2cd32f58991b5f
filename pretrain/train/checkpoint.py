"""Checkpoint protocol: write into step_X.tmp, hash, mark COMPLETE, rename, point `latest` at it, delete the oldest.

A reader takes the newest folder that is named step_X and holds COMPLETE. All other folders are incomplete (the process
was killed); the next save removes them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline.errors import UserError
from data_pipeline.storage.durable import make_folder, sync, write_errors
from data_pipeline.storage.files import publish
from pretrain.distributed.collectives import barrier, from_rank_0, gather, rank, world_size
from pretrain.run.folder import complete_steps, tag_of

HASH_BLOCK_BYTES = 1 << 22


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
        publish(str(partial / "manifest.json"), json.dumps(manifest, indent=1, sort_keys=True).encode())
        for entry in partial.rglob("*"):
            if entry.is_dir():
                sync(entry)
        publish(str(partial / "COMPLETE"), b"")  # syncs `partial` itself too
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

    Raises UserError on every rank, naming a damaged file.
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
    damages = [of_rank for of_rank in gather(damage) if of_rank]
    if damages:
        raise UserError(
            f"checkpoint {path}: {damages[0]}. Remove {path.name} to resume from the checkpoint before it."
        )
    return json.loads((path / "state.json").read_text())


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
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if all({"size", "xxh64"} <= set(entry) for entry in manifest.values()):
            return manifest
    except (FileNotFoundError, ValueError, AttributeError, TypeError):
        pass
    raise UserError(
        f"checkpoint {path}: manifest.json is missing or damaged. Remove {path.name} to resume from the checkpoint "
        "before it."
    )


def _set_aside(path: Path) -> Path:
    """Rename a checkpoint that is to be deleted, so that a kill half-way leaves nothing that looks complete."""
    doomed = path.with_name(path.name + ".old.tmp")  # not step_X.tmp, into which the same step may be written
    if doomed.exists():
        shutil.rmtree(doomed)
    return path.rename(doomed)
