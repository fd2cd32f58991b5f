"""mergekit's parameters for one tensor: filters, gradients over layers, and which scope wins."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from data_pipeline.errors import UserError
from pretrain.merge.mergekit.yaml_file import Input, MergekitFile, Settings, Slice
from pretrain.merge.planning.rules import interpolate

Scalar = float | bool


def evaluate(setting: Any, name: str, at: float) -> Scalar | None:
    """The value for tensor `name`; None where no filter matches.

    setting: a number or a boolean; a list of numbers, given at equal distances over the layers of the slice and
             interpolated between (booleans: the nearest one below); or `{filter, value}`, or a list of them, of which
             the first counts whose filter is absent, `*`, or found in the name.
    at:      place of the layer in its slice, from 0 to 1.
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
                f"mergekit parameter {entry!r}: write filter and value; mergekit passes over other keys, so that "
                "this would hold for every tensor"
            )
        wanted = entry.get("filter")
        if wanted is None or wanted == "*" or str(wanted) in name:
            return evaluate(entry["value"], name, at)
    return None


def _scalar(value: Any) -> Scalar:
    if isinstance(value, bool):
        return value
    try:
        number = float(value)  # YAML reads 1e-3 as text
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"mergekit parameter {value!r}: a finite number")
    return number


def scopes(file: MergekitFile, part: Slice, source: Input | None) -> Iterable[Settings]:
    """From the scope that wins to the one that is asked last: source, slice, module, whole file."""
    if source is not None:
        yield source.parameters
    yield part.parameters
    yield file.module
    yield file.parameters


def parameter(
    file: MergekitFile, part: Slice, source: Input | None, key: str, name: str, at: float
) -> Scalar | None:
    """The value of a parameter for a tensor; None where no scope gives one. `source`: of parameters of one input."""
    for scope in scopes(file, part, source):
        if key in scope:
            found = evaluate(scope[key], name, at)
            if found is not None:
                return found
    return None
