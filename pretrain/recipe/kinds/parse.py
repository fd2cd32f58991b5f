"""Reads an `objective` section as the options of its kind."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from pretrain.recipe.kinds import KINDS

# What a kind was called when recipes named the paper instead of the objective.
FORMER_NAMES = {"flip": "contrastive", "sphinx": "generative", "instruct": "generative"}


def parse_objective(value: Any) -> Any:
    """An `objective` section as the options of its kind. Raises ValidationError at the key that is wrong."""
    if not isinstance(value, Mapping):
        return value  # pydantic names the mistake
    kind = value.get("kind")
    if kind is None:
        raise _error("missing", kind, "is missing")
    if kind not in KINDS:
        former = FORMER_NAMES.get(str(kind))
        close = [former] if former else difflib.get_close_matches(str(kind), KINDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise _error("kind", kind, f"{kind!r} is none of {', '.join(KINDS)}{hint}")
    return KINDS[kind].options.model_validate(dict(value))


def _error(name: str, value: Any, message: str) -> ValidationError:
    problem = PydanticCustomError(name, "{message}", {"message": message})
    details = InitErrorDetails(type=problem, loc=("kind",), input=value)
    return ValidationError.from_exception_data("objective", [details])
