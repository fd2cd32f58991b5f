"""Parameters of a tensor in a mergekit file: filters, gradients over layers, and the precedence of scopes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from data_pipeline.errors import UserError
from pretrain.merge.mergekit.yaml_file import Input, MergekitFile, Settings, Slice
from pretrain.merge.planning.rules import interpolate

Scalar = float | bool


def evaluate(setting: Any, name: str, at: float) -> Scalar | None:
    """The value of a setting for tensor `name`; None if no filter matches.

    setting: a number or boolean; a list of numbers at equal distances over the layers of the slice, interpolated
             linearly (booleans: the nearest one below); or `{filter, value}` or a list of these: the first
             entry applies whose filter is missing, is `*`, or is part of the name.
    at:      position of the layer in its slice, from 0 to 1.
    """
    if isinstance(setting, dict):
        setting = [setting]
    if not isinstance(setting, list):
        return _scalar(setting)
    if not setting:
        return None
    if not any(isinstance(entry, dict) for entry in setting):
        values = [_scalar(entry) for entry in setting]
        if any(isinstance(value, bool) for value in values):
            return values[int(at * (len(values) - 1))]
        return interpolate(values, at)
    for entry in setting:
        if not isinstance(entry, dict) or not set(entry) <= {"filter", "value"} or "value" not in entry:
            raise UserError(
                f"mergekit parameter {entry!r}: write only filter and value; mergekit ignores other keys and "
                "would apply the value to every tensor"
            )
        pattern = entry.get("filter")
        if pattern is None or pattern == "*" or str(pattern) in name:
            return evaluate(entry["value"], name, at)
    return None


def _scalar(value: Any) -> Scalar:
    if isinstance(value, bool):
        return value
    try:
        number = float(value)  # YAML parses 1e-3 as a string
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"mergekit parameter {value!r}: must be a finite number")
    return number


def scopes(file: MergekitFile, part: Slice, source: Input | None) -> Iterable[Settings]:
    """Scopes in order of precedence: source, slice, module, whole file."""
    if source is not None:
        yield source.parameters
    yield part.parameters
    yield file.module
    yield file.parameters


def parameter(
    file: MergekitFile, part: Slice, source: Input | None, key: str, name: str, at: float
) -> Scalar | None:
    """The value of parameter `key` for tensor `name`; None if no scope sets it. `source`: its input, if any."""
    for scope in scopes(file, part, source):
        if key in scope:
            found = evaluate(scope[key], name, at)
            if found is not None:
                return found
    return None
