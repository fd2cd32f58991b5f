"""State dicts in files of torch.save: bare, or inside a training's checkpoint; one file or shards with an index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from pretrain.weights.byte_file import ByteFile
from pretrain.weights.formats.safetensors_file import Info, is_name
from pretrain.weights.formats.torch_file import Tensor, TorchFile

INSIDE = ("state_dict", "model_state_dict", "model", "module")
WRAPPED = "module."  # what DistributedDataParallel puts before every name, and open_clip's checkpoints keep


class StateDict:
    """A flat state dict at the top of a file, or under one of INSIDE.

    `tied`: a name that shares its memory with an earlier one -> that one; it is not in `names()`.
    """

    def __init__(self, file: ByteFile | Path | str) -> None:
        archive = TorchFile(file)
        content: Any = archive.content
        for _ in INSIDE:
            inner = next(
                (content[k] for k in INSIDE if isinstance(content, dict) and _is_dict(content.get(k))), None
            )
            if inner is None:
                break
            content = inner
        if not isinstance(content, dict):
            raise UserError(f"{archive.name}: holds no state dict")
        found = {name: value for name, value in content.items() if isinstance(value, Tensor)}
        if not found:
            raise UserError(f"{archive.name}: holds no tensors at its top nor under {', '.join(INSIDE)}")
        for name in found:
            if not is_name(name):
                raise UserError(
                    f"{archive.name}: a tensor is named {ascii(name)[:80]}, which is no printable text"
                )
        if all(name.startswith(WRAPPED) for name in found):
            found = {name.removeprefix(WRAPPED): value for name, value in found.items()}
        self.tied: dict[str, str] = {}
        self._tensors: dict[str, Tensor] = {}
        first: dict[object, str] = {}
        for name, tensor in found.items():
            if tensor.numel and (same := first.setdefault(tensor.place, name)) != name:
                self.tied[name] = same
            else:
                self._tensors[name] = tensor

    def names(self) -> list[str]:
        return list(self._tensors)

    def info(self, name: str) -> Info:
        return self._tensors[name].dtype, self._tensors[name].shape

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._tensors[name].read(start, stop)


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict) and len(value) > 0
