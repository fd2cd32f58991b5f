"""DeepSpeed universal checkpoints: one folder per parameter with its fp32 master weights in one file."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from pretrain.weights.byte_file import ByteFile
from pretrain.weights.dtypes import TensorInfo, elements
from pretrain.weights.folder import Folder
from pretrain.weights.formats.safetensors_file import is_name
from pretrain.weights.formats.torch_file import TorchFile
from pretrain.weights.formats.torch_tensor import Tensor

MASTER = "fp32.pt"
PARALLEL_OPENS = 8  # files opened concurrently


def is_universal(folder: Folder) -> bool:
    """True if DeepSpeed's `ds_to_universal` wrote this folder."""
    return "zero" in folder.folders and not folder.matching("*.safetensors", "*.bin")


class UniversalCheckpoint:
    """Parameters in `zero/NAME/fp32.pt`; those of ZeRO-3 are flat.

    The model file beside `zero` has their shapes, the buffers, and the names of shared weights (`tied`). Raises
    UserError naming the malformed file.
    """

    def __init__(self, folder: Folder) -> None:
        zero = folder.subfolder("zero")
        model = _Model(folder)
        self.tied = {alias: name for alias, name in model.shared.items() if name in zero.folders}
        names = [n for n in zero.folders if not n.endswith((".tmp", "_tmp")) and n not in self.tied]
        with ThreadPoolExecutor(PARALLEL_OPENS) as pool:
            opened = list(pool.map(lambda name: _open(zero, name), names))
        self.files: list[ByteFile] = [*model.files, *(file for file, _ in opened)]
        self._tensors = {name: tensor for name, (_, tensor) in zip(names, opened, strict=True)}
        if not self._tensors:
            raise UserError(f"{zero.url}: contains no parameter folders; convert the checkpoint again")
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in self._tensors.items():
            if not is_name(name) or tensor.dtype != "F32":
                raise UserError(
                    f"{zero.url}/{name}/{MASTER}: contains no fp32 master weights; convert the checkpoint again"
                )
            shape = model.shapes.get(name, tensor.shape)
            if elements(shape) != tensor.numel:
                raise UserError(
                    f"{zero.url}/{name}/{MASTER}: has {tensor.numel} elements; its shape in the model file is "
                    f"{list(shape)}"
                )
            self._shapes[name] = shape
        for name, tensor in model.buffers.items():  # `zero` may hold buffers too, but always as fp32
            self._tensors[name], self._shapes[name] = tensor, tensor.shape

    def names(self) -> list[str]:
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        return self._tensors[name].dtype, self._shapes[name]

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._tensors[name].read(start, stop)


def _open(zero: Folder, name: str) -> tuple[ByteFile, Tensor]:
    below = zero.subfolder(name)
    if MASTER not in below:
        raise UserError(f"{below.url}: contains no {MASTER}; convert the checkpoint again")
    file = below.open(MASTER)
    content: Any = TorchFile(file).content
    tensor = content.get("param") if isinstance(content, dict) else content
    if not isinstance(tensor, Tensor):
        raise UserError(f"{file.name}: contains no tensor `param`")
    return file, tensor


class _Model:
    """Shapes, shared names and buffers of the first model file beside `zero`; all empty if there is none."""

    def __init__(self, folder: Folder) -> None:
        self.files: list[ByteFile] = []
        content: Any = None
        for name in folder.matching("*_model_states.pt")[:1]:
            self.files.append(file := folder.open(name))
            content = TorchFile(file).content
        state: dict[str, Any] = content if isinstance(content, dict) else {}
        groups, shared, module = (state.get(key) for key in ("param_shapes", "shared_params", "module"))
        self.shapes: dict[str, tuple[int, ...]] = {}
        for group in groups if isinstance(groups, list) else []:
            for key, shape in group.items() if isinstance(group, dict) else ():
                if isinstance(shape, tuple) and all(type(n) is int and 0 <= n < 1 << 63 for n in shape):
                    self.shapes[str(key)] = shape
        pairs = shared.items() if isinstance(shared, dict) else ()
        self.shared = {a: n for a, n in pairs if isinstance(a, str) and isinstance(n, str)}
        names = state.get("buffer_names")
        kept = [n for n in names if is_name(n)] if isinstance(names, list) else []
        tensors = module if isinstance(module, dict) else {}
        self.buffers = {name: tensors[name] for name in kept if isinstance(tensors.get(name), Tensor)}
