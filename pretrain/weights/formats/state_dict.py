"""`StateDict`: finds the state dict in a torch file. A file that holds several is refused, unless a key chooses one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from pretrain.weights.byte_file import ByteFile
from pretrain.weights.dtypes import TensorInfo
from pretrain.weights.formats.chunked_tensor import ChunkedTensor
from pretrain.weights.formats.safetensors_file import is_name, short
from pretrain.weights.formats.torch_file import TorchFile
from pretrain.weights.formats.torch_pickle import Unread
from pretrain.weights.formats.torch_tensor import Tensor

STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "module")
# Keys of what a training stores beside its weights; tensors below them belong to no model.
NOT_WEIGHTS = re.compile(
    r"optim|sched|scaler|rng|random|callback|^loops$|hyper|sampler|dataloader|frozen_param|^arg|^config$",
    re.IGNORECASE,
)
TENSORS = (Tensor, ChunkedTensor)
MAX_DEPTH, MAX_NAMED = 5, 6
Place = tuple[str, ...]


class StateDict:
    """A flat state dict at the top level of a file, under one of STATE_DICT_KEYS, or at `key`.

    key:  keys joined by dots (`model_ema`, `model.encoder`).
    tied: name that shares its memory with an earlier tensor -> name of that tensor; tied names are not in `names()`.

    Raises UserError if there is no state dict, or if tensors stand in other dicts beside the chosen one, because they
    would be lost.
    """

    def __init__(self, file: ByteFile | Path | str, key: str | None = None) -> None:
        archive = TorchFile(file)
        found = select(archive.content, key, archive.name)
        for name in found:
            if not is_name(name):
                raise UserError(f"{archive.name}: the tensor name {ascii(name)[:80]} is not printable text")
        self.tied: dict[str, str] = {}
        self._tensors: dict[str, Tensor] = {}
        first: dict[object, str] = {}
        for name, tensor in found.items():
            if tensor.numel and (same := first.setdefault(tensor.memory_key, name)) != name:
                self.tied[name] = same
            else:
                self._tensors[name] = tensor

    def names(self) -> list[str]:
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        return self._tensors[name].dtype, self._tensors[name].shape

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._tensors[name].read(start, stop)


def select(content: Any, key: str | None, where: str) -> dict[str, Any]:
    """The tensors of the state dict in `content`, the object of a file `where`; see StateDict."""
    root: Any = content if key is None else _at(content, key)
    start: Place = () if key is None else (key,)
    if key is not None and not isinstance(root, dict):
        raise UserError(f"{where}: has no state dict {short(key)!r}{_choices(content, (), '; it has')}")
    if not isinstance(root, dict):
        raise UserError(
            f"{where}: contains no state dict; write a file with `torch.save(model.state_dict(), ...)`"
        )
    chosen, path = root, start
    for _ in STATE_DICT_KEYS:
        inner = next((k for k in STATE_DICT_KEYS if isinstance(chosen.get(k), dict) and chosen[k]), None)
        if inner is None:
            break
        chosen, path = chosen[inner], (*path, inner)
    found = {name: value for name, value in chosen.items() if isinstance(value, TENSORS)}
    unread = {name: value for name, value in chosen.items() if isinstance(value, Unread)}
    for name, value in unread.items():
        raise UserError(
            f"{where}: {short(str(name))} is a tensor {value.args[0]}, which cannot be merged; save the model with "
            "plain tensors, on the CPU and gathered from all ranks"
        )
    others = [(place, held) for place, held in state_dicts(root, start) if held is not chosen]
    if not found:
        raise UserError(
            f"{where}: contains no tensors at the top level or under {', '.join(STATE_DICT_KEYS)}"
            + (
                _choices(root, start, "; choose one of its state dicts with --key:")
                or "; put the state dict there"
            )
        )
    if others:
        place = f"under {'.'.join(path)}" if path else "at the top level"
        named = ", ".join(map(str, list(found)[:3])) + (", ..." if len(found) > 3 else "")
        raise UserError(
            f"{where}: holds {len(found)} tensor{'s' if len(found) > 1 else ''} {place} ({short(named)}), and others "
            f"under {_listed(others)}, which would be lost; choose one of its state dicts with --key, such as --key "
            f"{short('.'.join(others[0][0]))}"
        )
    return found


def state_dicts(content: Any, path: Place = ()) -> Iterator[tuple[Place, Mapping[Any, Any]]]:
    """Path and content of every dict in `content` that holds a tensor of at least one dimension; each dict once.

    Skips what NOT_WEIGHTS names, and keys that are numbers: an optimizer numbers its parameters.
    """
    seen: set[int] = set()
    waiting: list[tuple[Place, Any]] = [(path, content)]
    while waiting:
        place, value = waiting.pop()
        if id(value) in seen or len(place) > len(path) + MAX_DEPTH:
            continue
        seen.add(id(value))
        if isinstance(value, dict) and any(isinstance(t, TENSORS) and t.shape for t in value.values()):
            yield place, value
        items = value.items() if isinstance(value, dict) else ((str(i), item) for i, item in enumerate(value))
        below = [
            ((*place, name), inner)
            for name, inner in items
            if isinstance(inner, dict | list | tuple)
            and isinstance(name, str)
            and not NOT_WEIGHTS.search(name)
        ]
        waiting += reversed(below)


def _at(content: Any, key: str) -> Any:
    """The value at `key`; a dot in it may separate two keys or belong to one. None if there is none."""
    if isinstance(content, dict) and key in content:
        return content[key]
    for dot in (i for i, char in enumerate(key) if char == "."):
        head, rest = key[:dot], key[dot + 1 :]
        if isinstance(content, dict) and isinstance(content.get(head), dict | list | tuple):
            return _at(content[head], rest)
        if isinstance(content, list | tuple) and head.isdigit() and int(head) < len(content):
            return _at(content[int(head)], rest)
    if isinstance(content, list | tuple) and key.isdigit() and int(key) < len(content):
        return content[int(key)]
    return None


def _choices(content: Any, path: Place, before: str) -> str:
    found = [(place, held) for place, held in state_dicts(content, path) if place] if content else []
    return f"{before} {_listed(found)}" if found else ""


def _listed(found: list[tuple[Place, Mapping[Any, Any]]]) -> str:
    texts = [
        f"{'.'.join(place)} ({sum(isinstance(t, TENSORS) for t in held.values())} tensors)"
        for place, held in found[:MAX_NAMED]
    ]
    more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    return short(", ".join(texts)) + more
