"""Loads the weights at an address into a module; reads and writes frozen.safetensors and other safetensors files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from data_pipeline.storage.durable import sync, write_errors
from pretrain.recipe.parameter_names import expressions, folded, matching
from pretrain.weights.source import WeightSource, open_weights

TORCH_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# What modules were called in runs of earlier versions.
FORMER_NAMES = {"projector.0.": "connector.0.linear.", "projector.1.": "connector.0.norm."}
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


def has_whole(weights: Mapping[str, Tensor], part: Mapping[str, Tensor]) -> bool:
    """Whether weights have all tensors of a part of a model, in its shapes; False for a part without tensors."""
    return bool(part) and all(
        name in weights and weights[name].shape == tensor.shape for name, tensor in part.items()
    )


def load_whole(module: nn.Module, state: dict[str, Tensor], address: str) -> None:
    """Copy `state` into a module that must find all its parameters there; what else is in `state` is left alone.

    Raises UserError as `load_into` does, and for a parameter that `state` lacks.
    """
    report = load_into(module, state, address)
    if report.new:
        names = ", ".join(folded(report.new, {name for name, _ in module.named_parameters()} - {*report.new}))
        raise UserError(f"{address}: has no weights for {names}; name weights of the whole module")


@dataclass(frozen=True)
class LoadReport:
    """Names that differ between a model and the weights loaded into it.

    new:    parameters of the model that the weights lack; they stay as initialised
    unused: tensors of the weights that the model lacks
    """

    new: list[str]
    unused: list[str]


def load_into(
    model: nn.Module, state: dict[str, Tensor], address: str, allow: Sequence[str] | None = None
) -> LoadReport:
    """Copy `state` into the parameters and buffers of `model`.

    Whole modules may be missing in `state`, for example a connector after a text-only stage, or in the model; a part of
    a module (some of its layers) only if the regular expressions `allow` (those of `init_allow`; None: there is no such
    key) match all its names. Raises UserError, which names `address`, when shapes differ, when more differs than that,
    or when no name is shared.
    """
    targets = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    state = {_present_name(name, targets): tensor for name, tensor in state.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    report = compare(model, shapes, address, allow)
    tied = [
        f"{name}: differs from {first}, with which the model shares it"
        for name, first in _tied_pairs(model)
        if name in state and first in state and not torch.equal(state[name], state[first])
    ]
    _refuse(address, tied)
    with torch.no_grad():
        for name, tensor in state.items():
            if name in targets:
                targets[name].copy_(tensor.reshape(targets[name].shape))
    return report


def compare(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], address: str, allow: Sequence[str] | None = None
) -> LoadReport:
    """The check of `load_into`, which needs only the names and shapes of the weights."""
    targets = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    shared = [name for name in targets if name in shapes]
    mismatches = [
        f"{name}: {shapes[name]} in the weights, {tuple(targets[name].shape)} in the model"
        for name in shared
        if _long_sides(shapes[name]) != _long_sides(tuple(targets[name].shape))
    ]
    other_name = dict(_tied_pairs(model))
    new = [
        name
        for name, _ in model.named_parameters()
        if name not in shapes
        and not any(first == name and alias in shapes for alias, first in other_name.items())
    ]
    report = LoadReport(new, [name for name in shapes if name not in targets])
    modules = {name.split(".")[0] for name in shared}
    partial = [
        [
            name
            for name in names
            if "." in name and name.split(".")[0] in modules and not _allowed(name, allow)
        ]
        for names in (report.new, report.unused)
    ]
    mismatches += [
        f"{line}: missing in the weights" for line in folded(partial[0], {*targets} - {*partial[0]})
    ]
    mismatches += [f"{line}: not used by the model" for line in folded(partial[1], {*shapes} - {*partial[1]})]
    if not shared:
        mismatches.append("no tensor of the model is in the weights")
    advice = ""
    if any(partial) and allow is not None:
        lines = [*allow, *expressions(partial[0], {*targets} - {*partial[0]})]
        lines += [each for each in expressions(partial[1], {*shapes} - {*partial[1]}) if each not in lines]
        quoted = ", ".join("'" + each.replace("'", "''") + "'" for each in lines)
        advice = f"\nif the rest is to start without them, write init_allow: [{quoted}]"
    _refuse(address, mismatches, advice)
    return report


def _present_name(name: str, targets: Mapping[str, Tensor]) -> str:
    """The name that a tensor has today; FORMER_NAMES has those of runs of earlier versions."""
    if name in targets:
        return name
    renamed = (new + name.removeprefix(old) for old, new in FORMER_NAMES.items() if name.startswith(old))
    return next((candidate for candidate in renamed if candidate in targets), name)


def _long_sides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without sides of 1: a scalar fits a vector of one element."""
    return tuple(side for side in shape if side != 1)


def _tied_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """(other name, first name) of the parameters that the model holds under several names."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return [(name, first[id(parameter)]) for name, parameter in every if name != first[id(parameter)]]


def _allowed(name: str, allow: Sequence[str] | None) -> bool:
    return any(matching(expression, [name]) for expression in allow or ())


def _refuse(address: str, mismatches: Sequence[str], advice: str = "") -> None:
    """Raise UserError with the mismatches, if there are any."""
    if mismatches:
        lines = "\n  ".join(mismatches[:LISTED_MISMATCHES])
        unlisted = len(mismatches) - LISTED_MISMATCHES
        end = f"\n  ... and {unlisted} more" if unlisted > 0 else ""
        raise UserError(f"the weights at {address} do not fit the model:\n  {lines}{end}{advice}")


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors as one safetensors file of an exported folder; not atomic."""
    from safetensors.torch import save_file

    save_file(
        {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()},
        path,
        metadata={"format": "pt"},
    )
    grant_by_umask(path)


def grant_by_umask(path: Path) -> None:
    """Give a file the mode of any new file; safetensors creates its files for their owner alone."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        probe = Path(folder) / "probe"
        probe.touch()
        path.chmod(probe.stat().st_mode & 0o777)


def write_frozen(path: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write a stage's frozen tensors, atomically, with the description from which their encoder is rebuilt."""
    from safetensors.torch import save_file

    temporary = path.with_suffix(".tmp")
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", "towers": json.dumps(description, sort_keys=True)}
    with write_errors(path):
        save_file(whole, temporary, metadata=metadata)
        grant_by_umask(temporary)
        sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def read_description(path: Path) -> dict[str, Any]:
    """The description that `write_frozen` wrote; empty without the file. Raises UserError if it is damaged."""
    if not path.exists():
        return {}
    with _opened(path) as file:
        described: dict[str, Any] = json.loads((file.metadata() or {}).get("towers", "{}"))
    return described


def read_frozen(path: Path) -> dict[str, Tensor]:
    """The tensors that `write_frozen` wrote; empty without the file. Raises UserError if it is damaged."""
    if not path.exists():
        return {}
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The safetensors file at `path`. What is wrong with it, or with a tensor read from it, is a UserError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError) as error:  # ValueError: its description is no JSON
        raise UserError(
            f"{path} is damaged: {error}; restore it, or delete {path.parent} and train the stage again"
        ) from None
