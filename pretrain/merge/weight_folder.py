"""Which files of a folder hold its weights: through an index, or the one file there is; safetensors before pickles."""

from __future__ import annotations

from typing import Any

from data_pipeline.errors import UserError
from pretrain.merge.folder import Folder

FROZEN = "frozen.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
INDEXES = (SAFETENSORS_INDEX, "pytorch_model.bin.index.json")
SINGLE = (
    "model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin",
)  # fmt: skip


def weight_files(folder: Folder, address: str) -> dict[str, set[str]]:
    """File -> the tensors that the index says are in it (none are named where there is no index).

    Raises UserError for an index that is none, that names files outside of the folder or absent ones, and for a
    folder of which it is not clear what its weights are.
    """
    for index in INDEXES:
        if index in folder:
            return _by_index(folder, index)
    for name in SINGLE:
        if name in folder:
            return {name: set()}
    for suffix in (".safetensors", ".bin", ".pt", ".pth"):
        found = [name for name in folder.matching(f"*{suffix}") if name not in (FROZEN, "training_args.bin")]
        if len(found) == 1:
            return {found[0]: set()}
        if found:
            raise UserError(
                f"{address}: {len(found)} {suffix} files and no index in {folder.url}; name one file, or RUN/STAGE"
            )
    raise UserError(
        f"{address}: no safetensors file and no checkpoint in {folder.url}; name one file, or RUN/STAGE"
    )


def _by_index(folder: Folder, index: str) -> dict[str, set[str]]:
    content = folder.json(index)
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
