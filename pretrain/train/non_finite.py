"""Steps whose loss or gradient is not finite: which stream and module they come from, and how many come in a row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.distributed.collectives import gather
from pretrain.distributed.engine import Engine
from pretrain.objectives.base import Objective
from pretrain.objectives.device_batch import DeviceBatch
from pretrain.run.failures import RunStopped
from pretrain.run.incidents import Origin

# In the order in which a computation meets them.
KINDS = ("output", "loss", "gradient")


class NonFinite(RunStopped):
    """More steps in a row than train.max_skipped have a loss or a gradient that is not finite."""


@dataclass
class _Watch:
    """What forward hooks saw: modules in the order of their calls, and the first output that is not finite."""

    called: dict[str, int] = field(default_factory=dict)
    bad_output: str | None = None


def find_origin(
    engine: Engine,
    objective: Objective,
    rows_of: Callable[[str], Collection[DeviceBatch]],
    denominators: Mapping[str, float],
) -> Origin | None:
    """Compute a step again, from the same weights and rows, and find where the first non-finite value appears.

    Collective. Updates nothing. Watching every module costs nothing in the steps that are finite, because it happens
    only here. None if all values are finite this time, which points to the hardware.
    """
    found: list[Origin] = []
    with watched(engine.module) as watch, engine.accumulate():
        for stream in objective.streams:
            before = engine.non_finite_gradients()
            parts = objective.backward(engine, stream, rows_of(stream), float(denominators[stream]))
            if watch.bad_output is not None:
                found.append(Origin(stream, "output", watch.bad_output))
                watch.bad_output = None
            elif not torch.isfinite(parts["loss"]):
                found.append(Origin(stream, "loss", None))
            elif names := engine.non_finite_gradients() - before:
                found.append(Origin(stream, "gradient", _last_called(names, watch.called)))
    engine.discard()
    streams = list(objective.streams)
    origins = [origin for of_rank in gather(found) for origin in of_rank]
    return min(origins, key=lambda each: (streams.index(each.stream), KINDS.index(each.kind)), default=None)


@contextmanager
def watched(module: nn.Module) -> Iterator[_Watch]:
    """Hooks on `module` and all modules below it, for the time of the block."""
    watch, handles = _Watch(), []
    for name, each in module.named_modules():
        name = name or type(module).__name__

        def before(_: nn.Module, __: Any, name: str = name) -> None:
            watch.called.setdefault(name, len(watch.called))

        def after(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            if watch.bad_output is None and not all(torch.isfinite(each).all() for each in _tensors(output)):
                watch.bad_output = name

        handles += [each.register_forward_pre_hook(before), each.register_forward_hook(after)]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a module's output."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for each in output.values():
            yield from _tensors(each)
    elif isinstance(output, list | tuple):
        for each in output:
            yield from _tensors(each)


def _last_called(parameters: Iterable[str], called: Mapping[str, int]) -> str:
    """The module, among those of the parameters, that the forward called last: a backward reaches it first.

    For a parameter of the model itself, its own name.
    """
    modules = {name.rpartition(".")[0] or name for name in parameters}
    return max(sorted(modules), key=lambda name: called.get(name, -1))
