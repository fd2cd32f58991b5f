"""DeepSpeed's universal checkpoints: a folder for every parameter, its fp32 master in a file of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from pretrain.merge.folder import Folder
from pretrain.merge.remote_file import ByteFile
from pretrain.merge.safetensors_io import Info, elements, is_name
from pretrain.merge.torch_zip import Tensor, TorchFile

MASTER = "fp32.pt"
SIDE_BY_SIDE = 8


def is_universal(folder: Folder) -> bool:
    """Whether `ds_to_universal` of DeepSpeed wrote this folder."""
    return "zero" in folder.folders and not folder.matching("*.safetensors", "*.bin")


class Universal:
    """Parameters in `zero/NAME/fp32.pt`. Those of ZeRO-3 are flat there; their shapes stand in the model file, where
    there is one. Raises UserError naming the file that is not what it should be.
    """

    def __init__(self, folder: Folder) -> None:
        zero = folder.below("zero")
        names = [name for name in zero.folders if not name.endswith((".tmp", "_tmp"))]
        shapes = _shapes(folder)
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            opened = list(pool.map(lambda name: _open(zero, name), names))
        self.files: list[ByteFile] = [file for file, _ in opened]
        self._tensors = {name: tensor for name, (_, tensor) in zip(names, opened, strict=True)}
        if not self._tensors:
            raise UserError(f"{zero.url}: no folders of parameters in it")
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in self._tensors.items():
            if not is_name(name) or tensor.dtype != "F32":
                raise UserError(f"{zero.url}/{name}/{MASTER}: holds no fp32 master")
            shape = shapes.get(name, tensor.shape)
            if elements(shape) != tensor.numel:
                raise UserError(
                    f"{zero.url}/{name}/{MASTER}: {tensor.numel} elements, the model file says {list(shape)}"
                )
            self._shapes[name] = shape

    def names(self) -> list[str]:
        return list(self._tensors)

    def info(self, name: str) -> Info:
        return "F32", self._shapes[name]

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._tensors[name].read(start, stop)


def _open(zero: Folder, name: str) -> tuple[ByteFile, Tensor]:
    below = zero.below(name)
    if MASTER not in below:
        raise UserError(f"{below.url}: holds no {MASTER}; convert the checkpoint again")
    file = below.open(MASTER)
    content: Any = TorchFile(file).content
    tensor = content.get("param") if isinstance(content, dict) else content
    if not isinstance(tensor, Tensor):
        raise UserError(f"{file.name}: holds no tensor `param`")
    return file, tensor


def _shapes(folder: Folder) -> dict[str, tuple[int, ...]]:
    """param_shapes of a model file that was copied beside `zero`."""
    for name in folder.matching("*_model_states.pt")[:1]:
        content: Any = TorchFile(folder.open(name)).content
        groups = content.get("param_shapes") if isinstance(content, dict) else None
        found: dict[str, tuple[int, ...]] = {}
        for group in groups if isinstance(groups, list) else []:
            for key, shape in group.items() if isinstance(group, dict) else ():
                if isinstance(shape, tuple) and all(type(n) is int and 0 <= n < 1 << 63 for n in shape):
                    found[str(key)] = shape
        return found
    return {}
