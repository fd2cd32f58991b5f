"""The checkpoint protocol: files in step_X.tmp, hashes, COMPLETE, rename, `latest`; the newest complete one wins."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash

from data_pipeline.errors import UserError
from data_pipeline.storage import publish
from pretrain.checkpoint_folder import complete_steps, tag_of


def _hash(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh64()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "xxh64": digest.hexdigest()}


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _everyone(value: Any) -> list[Any]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def save(
    folder: Path, step: int, state: dict[str, Any], write: Callable[[Path, str], None], keep: int
) -> Path:
    """Write one checkpoint so that a kill at any instant leaves the previous one or this one; collective.

    `write(folder, tag)` puts every rank's files into `folder/tag`. Each rank flushes and hashes its share of them.
    The `keep` newest complete checkpoints stay.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    final, tag = folder / tag_of(step), tag_of(step) + ".tmp"
    partial = folder / tag
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("step_*.tmp"):
            shutil.rmtree(left)
    _everyone(None)
    write(folder, tag)
    if rank == 0:
        (partial / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True))
    _everyone(None)
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    mine = {str(path.relative_to(partial)): _hash(path) for path in files[rank::world]}
    parts = _everyone(mine)
    if rank == 0:
        manifest = {name: entry for part in parts for name, entry in part.items()}
        publish(str(partial / "manifest.json"), json.dumps(manifest, indent=1, sort_keys=True).encode())
        publish(str(partial / "COMPLETE"), b"")
        _sync_folder(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _sync_folder(folder)
        publish(str(folder / "latest"), final.name.encode())
        for old in complete_steps(folder)[:-keep]:
            shutil.rmtree(folder / tag_of(old))
    _everyone(None)
    return final


def verify(path: Path) -> dict[str, Any]:
    """Check a checkpoint against its manifest and return its `state.json`; a damaged one is named."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name, entry in manifest.items():
        file = path / name
        if not file.exists() or file.stat().st_size != entry["size"]:
            size = file.stat().st_size if file.exists() else "missing"
            raise UserError(
                f"checkpoint {path}: {name} is {size}, the manifest says {entry['size']} bytes. "
                f"Remove the folder {path.name} to resume from the checkpoint before it."
            )
        if _hash(file)["xxh64"] != entry["xxh64"]:
            raise UserError(
                f"checkpoint {path}: {name} is damaged (hash differs). Remove {path.name} and run again."
            )
    return json.loads((path / "state.json").read_text())
