"""What of a model trains, and at which rate: `model.freeze`, `optimizer.groups`, and the table of both.

Names are those of the parameters and frozen buffers of the objective's model. A tied weight has all its names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from data_pipeline.errors import UserError
from pretrain.objectives.base import Objective
from pretrain.recipe.parameter_names import SHORT_NAMES, matching, no_match
from pretrain.recipe.schema import Optimizer, TrainStage


def apply_freeze(objective: Objective, expressions: Sequence[str]) -> None:
    """Exclude the parameters that the expressions match from training.

    Raises UserError for an expression that matches nothing, with the nearest names.
    """
    names = parameter_names(objective)
    parameters = dict(objective.model.named_parameters(remove_duplicate=False))
    for expression in expressions:
        for name in matched(expression, names, "model.freeze"):
            if name in parameters:
                parameters[name].requires_grad_(False)


def parameter_names(objective: Objective) -> list[str]:
    """The names that expressions can match."""
    names = [name for name, _ in objective.model.named_parameters(remove_duplicate=False)]
    return [*names, *(name for name in objective.frozen() if name not in names)]


def matched(expression: str, names: Sequence[str], key: str) -> list[str]:
    """The names that an expression matches. Raises UserError, which names `key`, if there is none."""
    try:
        found = matching(expression, names)
    except re.error as error:
        raise UserError(f"{key}: {expression!r} is not a valid regular expression: {error}") from None
    if not found:
        raise UserError(f"{key}: {no_match(expression, names)}")
    return found


def check_streams_train(objective: Objective, stage: TrainStage) -> None:
    """Raise UserError for a stream whose loss depends on no parameter that trains.

    A stream without images does not pass through vision encoders and connectors.
    """
    image_path = {
        name for short in ("vision", "connector") for name in matching(short, parameter_names(objective))
    }
    for stream in objective.streams:
        has_images = stage.data[stream].image is not None
        if not any(
            parameter.requires_grad and (has_images or name not in image_path)
            for name, parameter in objective.model.named_parameters(remove_duplicate=False)
        ):
            raise UserError(
                f"data.{stream}: no parameter that this stream uses is trained (model.freeze: "
                f"{', '.join(stage.model.freeze)}); freeze less, or remove the stream (data.{stream}: null)"
            )


def group_names(objective: Objective, optimizer: Optimizer) -> list[frozenset[str]]:
    """The names of the trained parameters of each of `optimizer.groups`: a parameter is in the first that matches it.

    Raises UserError for a group that matches no parameter, none that trains, or only those of earlier groups.
    """
    names = parameter_names(objective)
    aliases = _aliases(objective.model)
    trained = {
        name for name, p in objective.model.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    taken: set[str] = set()
    groups = []
    for index, group in enumerate(optimizer.groups or []):
        key = f"optimizer.groups.{index}.match"
        found = {
            alias for name in matched(group.match, names, key) for alias in aliases.get(name, ())
        } & trained
        if not found:
            raise UserError(f"{key}: {group.match!r} matches only frozen parameters; remove the group")
        if not found - taken:
            raise UserError(
                f"{key}: all parameters that {group.match!r} matches belong to an earlier group; put it first"
            )
        groups.append(frozenset(found - taken))
        taken |= found
    return groups


@dataclass
class _Row:
    """A line of the table: parameters of one part, with one setting."""

    part: str
    setting: str
    tensors: int = 0
    parameters: int = 0


def training_table(objective: Objective, stage: TrainStage, peak: float) -> list[str]:
    """What trains, at which peak rate, with numbers of parameters, as lines for the terminal.

    `peak` is the peak rate outside of `optimizer.groups`. Raises UserError as `group_names` does.
    """
    optimizer = stage.optimizer
    groups = group_names(objective, optimizer)
    rows: dict[tuple[str, str], _Row] = {}
    total = trained = 0
    sizes = {name: (p.numel(), p.requires_grad) for name, p in objective.model.named_parameters()}
    sizes |= {name: (t.numel(), False) for name, t in objective.frozen().items() if name not in sizes}
    for name, (size, trains) in sizes.items():
        index = next((index for index, names in enumerate(groups) if name in names), None)
        setting = _setting(optimizer, index, peak) if trains else "frozen"
        row = rows.setdefault((part := _part(name), setting), _Row(part, setting))
        row.tensors, row.parameters = row.tensors + 1, row.parameters + size
        total, trained = total + size, trained + size * trains
    widths = [max(len(getattr(row, key)) for row in rows.values()) for key in ("part", "setting")]
    count = max(len(f"{row.parameters:,}") for row in rows.values())
    return [
        f"trains {trained:,} of {total:,} parameters",
        *(
            f"  {row.part:<{widths[0]}}  {row.setting:<{widths[1]}}  {row.parameters:>{count},} parameters"
            for row in rows.values()
        ),
    ]


def _setting(optimizer: Optimizer, index: int | None, peak: float) -> str:
    group = optimizer.groups[index] if optimizer.groups and index is not None else None
    rate = peak * group.scale(peak) if group else peak
    decay = optimizer.weight_decay if group is None or group.weight_decay is None else group.weight_decay
    warmup = f", warmup {group.warmup}" if group and group.warmup is not None else ""
    return f"lr {rate:g}, weight_decay {decay:g}{warmup}" + (f" ({group.match})" if group else "")


def _part(name: str) -> str:
    return next((short for short in SHORT_NAMES if matching(short, [name])), name.split(".")[0])


def _aliases(model: nn.Module) -> dict[str, Iterable[str]]:
    """Name -> all names of the same parameter."""
    by_parameter: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_parameter.setdefault(id(parameter), []).append(name)
    return {name: names for names in by_parameter.values() for name in names}
