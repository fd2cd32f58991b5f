"""Weights from an address into a module, and the frozen tensors that a stage keeps beside its checkpoints."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from pretrain.weights.source import WeightSource, open_weights

TORCH_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def to_tensor(source: WeightSource, name: str) -> Tensor:
    """One whole tensor of a source; bfloat16 arrives as its 16 bits."""
    dtype, shape = source.info(name)
    flat = source.read(name, 0, int(np.prod(shape, dtype=np.int64)))
    tensor = torch.from_numpy(np.array(flat, copy=True))
    wanted = TORCH_TYPES[dtype]
    if tensor.dtype != wanted:
        tensor = tensor.view(wanted) if dtype == "BF16" else tensor.to(wanted)
    return tensor.reshape(shape)


def read_state(address: str, run_dir: Path | None = None) -> dict[str, Tensor]:
    """Every tensor at an address, frozen ones included."""
    source = open_weights(address, run_dir)
    return {name: to_tensor(source, name) for name in source.names()}


@dataclass(frozen=True)
class Loaded:
    """What a load did: names left as initialised, and names of the source that the model has no place for."""

    new: list[str]
    unused: list[str]


def load_into(model: nn.Module, state: dict[str, Tensor], address: str) -> Loaded:
    """Copy `state` into `model`. Whole modules may be new to it (a projector after a text-only stage), not single
    tensors of a module it has; a different shape, or a source with nothing in common, is a UserError.
    """
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shared = [name for name in own if name in state]
    wrong = [
        f"{name}: {tuple(state[name].shape)} in the weights, {tuple(own[name].shape)} in the model"
        for name in shared
        if state[name].numel() != own[name].numel()
        or state[name].squeeze().shape != own[name].squeeze().shape
    ]
    new = [name for name in dict(model.named_parameters()) if name not in state]
    known = {name.split(".")[0] for name in shared}
    wrong += [
        f"{name}: missing in the weights" for name in new if name.split(".")[0] in known and "." in name
    ]
    if not shared:
        wrong.append("no tensor of the model is in the weights")
    if wrong:
        listed = "\n  ".join(wrong[:20]) + ("" if len(wrong) <= 20 else f"\n  ... and {len(wrong) - 20} more")
        raise UserError(f"the weights at {address} do not fit the model:\n  {listed}")
    with torch.no_grad():
        for name in shared:
            own[name].copy_(state[name].reshape(own[name].shape))
    return Loaded(new, [name for name in state if name not in own])


def write_frozen(path: Path, tensors: dict[str, Tensor], describe: dict[str, Any]) -> None:
    """Publish a stage's frozen tensors with a description of the towers they belong to."""
    from safetensors.torch import save_file

    temporary = path.with_suffix(".tmp")
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, temporary, metadata={"format": "pt", "towers": json.dumps(describe, sort_keys=True)})
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def read_frozen(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the description that `write_frozen` wrote; empty when the stage froze nothing."""
    if not path.exists():
        return {}, {}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        described = (file.metadata() or {}).get("towers", "{}")
    return tensors, json.loads(described)
