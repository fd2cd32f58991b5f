"""Loads the weights at an address into a module; reads and writes frozen.safetensors and other safetensors files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from data_pipeline.storage.durable import sync, write_errors
from pretrain.weights.source import WeightSource, open_weights

TORCH_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# Mismatches that an error lists one by one.
LISTED_MISMATCHES = 20


def to_tensor(source: WeightSource, name: str) -> Tensor:
    """One whole tensor of a source, in its stored dtype."""
    dtype, shape = source.info(name)
    flat = source.read(name, 0, int(np.prod(shape, dtype=np.int64)))
    tensor = torch.from_numpy(np.array(flat, copy=True))
    torch_type = TORCH_TYPES[dtype]
    if tensor.dtype != torch_type:
        # numpy has no bfloat16: the source returns its 16 bits as integers.
        tensor = tensor.view(torch_type) if dtype == "BF16" else tensor.to(torch_type)
    return tensor.reshape(shape)


def read_state(address: str, run_dir: Path | None = None) -> dict[str, Tensor]:
    """All tensors at an address by name, frozen ones included."""
    source = open_weights(address, run_dir)
    return {name: to_tensor(source, name) for name in source.names()}


@dataclass(frozen=True)
class LoadReport:
    """Names that differ between a model and the weights loaded into it.

    new:    parameters of the model that the weights lack; they stay as initialised
    unused: tensors of the weights that the model lacks
    """

    new: list[str]
    unused: list[str]


def load_into(model: nn.Module, state: dict[str, Tensor], address: str) -> LoadReport:
    """Copy `state` into the parameters and buffers of `model`.

    Whole modules may be missing in `state`, for example a projector after a text-only stage. Raises UserError, which
    names `address`, when shapes differ, when single tensors of a module are missing, or when no name is shared.
    """
    targets = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shared = [name for name in targets if name in state]
    mismatches = [
        f"{name}: {tuple(state[name].shape)} in the weights, {tuple(targets[name].shape)} in the model"
        for name in shared
        if state[name].numel() != targets[name].numel()
        or state[name].squeeze().shape != targets[name].squeeze().shape
    ]
    new = [name for name in dict(model.named_parameters()) if name not in state]
    shared_modules = {name.split(".")[0] for name in shared}
    mismatches += [
        f"{name}: missing in the weights"
        for name in new
        if name.split(".")[0] in shared_modules and "." in name
    ]
    if not shared:
        mismatches.append("no tensor of the model is in the weights")
    if mismatches:
        lines = "\n  ".join(mismatches[:LISTED_MISMATCHES])
        unlisted = len(mismatches) - LISTED_MISMATCHES
        end = f"\n  ... and {unlisted} more" if unlisted > 0 else ""
        raise UserError(f"the weights at {address} do not fit the model:\n  {lines}{end}")
    with torch.no_grad():
        for name in shared:
            targets[name].copy_(state[name].reshape(targets[name].shape))
    return LoadReport(new, [name for name in state if name not in targets])


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors as one safetensors file of an exported folder; not atomic."""
    from safetensors.torch import save_file

    save_file(
        {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()},
        path,
        metadata={"format": "pt"},
    )


def write_frozen(path: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write a stage's frozen tensors, atomically, with the description from which their tower is rebuilt."""
    from safetensors.torch import save_file

    temporary = path.with_suffix(".tmp")
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", "towers": json.dumps(description, sort_keys=True)}
    with write_errors(path):
        save_file(whole, temporary, metadata=metadata)
        sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def read_frozen(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description that `write_frozen` wrote; both empty when the file does not exist."""
    if not path.exists():
        return {}, {}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        description = (file.metadata() or {}).get("towers", "{}")
    return tensors, json.loads(description)
