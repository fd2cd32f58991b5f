"""The checkpoint protocol: files in step_X.tmp, hashes, COMPLETE, rename, `latest`; the newest complete one wins."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline.errors import UserError
from data_pipeline.storage.files import publish, sync
from pretrain.distributed.collectives import barrier, from_first, gather, rank, world_size
from pretrain.run.folder import complete_steps, tag_of


def _hash(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh64()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "xxh64": digest.hexdigest()}


def save(
    folder: Path, step: int, state: dict[str, Any], write: Callable[[Path, str], None], keep: int
) -> Path:
    """Write one checkpoint so that a kill at any instant leaves the previous one or this one; collective.

    `write(folder, tag)` puts every rank's files into `folder/tag`. Each rank flushes and hashes its share of them,
    of the list that rank 0 saw. The `keep` newest complete checkpoints stay.
    """
    final, tag = folder / tag_of(step), tag_of(step) + ".tmp"
    partial = folder / tag
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("step_*.tmp"):
            shutil.rmtree(left)
    barrier()
    write(folder, tag)
    if rank() == 0:
        (partial / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True))
    barrier()
    names = from_first(sorted(str(p.relative_to(partial)) for p in partial.rglob("*") if p.is_file()))
    parts = gather({name: _hash(partial / name) for name in names[rank() :: world_size()]})
    if rank() == 0:
        manifest = {name: entry for part in parts for name, entry in part.items()}
        publish(str(partial / "manifest.json"), json.dumps(manifest, indent=1, sort_keys=True).encode())
        publish(str(partial / "COMPLETE"), b"")
        sync(partial)
        if final.exists():
            _remove(final)
        partial.rename(final)
        sync(folder)
        publish(str(folder / "latest"), final.name.encode())
        for old in complete_steps(folder)[:-keep]:
            _remove(folder / tag_of(old))
    barrier()
    return final


def _remove(path: Path) -> None:
    """Delete a checkpoint so that a kill half-way leaves nothing that looks complete; the next save sweeps the rest."""
    gone = path.with_name(path.name + ".old.tmp")  # not the name under which the same step is being written
    if gone.exists():
        shutil.rmtree(gone)
    path.rename(gone)
    shutil.rmtree(gone)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if all({"size", "xxh64"} <= set(entry) for entry in manifest.values()):
            return manifest
    except (FileNotFoundError, ValueError, AttributeError, TypeError):
        pass
    raise UserError(
        f"checkpoint {path}: manifest.json is missing or damaged. Remove {path.name} to go on from the checkpoint "
        "before it."
    )


def verify(path: Path) -> dict[str, Any]:
    """Check a checkpoint against its manifest and return its `state.json`; collective, each rank hashes its share.

    Raises UserError on every rank, naming the first damaged file.
    """
    manifest = _read_manifest(path)
    wrong = None
    for name, entry in sorted(manifest.items())[rank() :: world_size()]:
        file = path / name
        size = file.stat().st_size if file.exists() else "missing"
        if size != entry["size"]:
            wrong = f"{name} is {size}, the manifest says {entry['size']} bytes"
        elif _hash(file)["xxh64"] != entry["xxh64"]:
            wrong = f"{name} is damaged (its hash differs)"
        if wrong:
            break
    told = [one for one in gather(wrong) if one]
    if told:
        raise UserError(
            f"checkpoint {path}: {told[0]}. Remove {path.name} to go on from the checkpoint before it."
        )
    return json.loads((path / "state.json").read_text())


def hash_file(path: Path) -> str | None:
    """16 hex digits of a file, None where there is none."""
    return _hash(path)["xxh64"] if path.exists() else None
