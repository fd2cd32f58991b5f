"""Base classes and value types of the recipe schema: strict sections, durations, counts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
LENGTH = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([kMBT]?)\s*(steps?|samples?|epochs?)?\s*$")


class Strict(BaseModel):
    """Base of every section: read-only, and unknown keys are errors.

    The docstring below each field documents its key. These docstrings are not used at run time: pydantic's
    `use_attribute_docstrings` would add a tenth to the import time of the schema.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


def parse_variant(
    value: Any,
    selector: str,
    variants: Mapping[str, type[Strict]],
    default: str | None = None,
    former: Mapping[str, str] | None = None,
) -> Any:
    """A section as the class that the value of its key `selector` names; a value that is no map is left to pydantic.

    `default`: the name if the key is absent. `former`: earlier names, for the message. Raises ValidationError.
    """
    if not isinstance(value, Mapping):
        return value
    value = {key: item for key, item in value.items() if key != selector or item is not None}
    name = value.get(selector, default)
    if name is None:
        raise _error(selector, "missing", name, "")
    if not isinstance(name, str) or name not in variants:
        old = (former or {}).get(str(name))
        close = [old] if old else difflib.get_close_matches(str(name), variants, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise _error(selector, "variant", name, f"{name!r} is none of {', '.join(variants)}{hint}")
    return variants[name].model_validate(value)


def _error(key: str, name: str, value: Any, message: str) -> ValidationError:
    problem = variant_error(message) if name == "variant" else name
    details = InitErrorDetails(type=problem, loc=(key,), input=value)
    return ValidationError.from_exception_data("section", [details])


def variant_error(message: str) -> PydanticCustomError:
    """The error of a section whose selector names no variant."""
    return PydanticCustomError("variant", "{message}", {"message": message})


class Length(Strict):
    """A duration: `500` or `500 steps`, `51M samples`, `0.03 epochs`."""

    value: float = Field(ge=0)
    unit: Literal["steps", "samples", "epochs"] = "steps"

    def __str__(self) -> str:
        value = int(self.value) if self.value.is_integer() else self.value
        return f"{value!r} {self.unit}"


def parse_length(value: Any, unit: str = "steps") -> Any:
    """`51M samples` -> Length(51e6, "samples"). A number without a unit is in `unit`.

    Raises ValueError for text that is not a length; leaves a Length or a map to pydantic.
    """
    if isinstance(value, Length | dict):
        return value
    if isinstance(value, bool):
        raise ValueError("a length is a number with steps, samples or epochs")
    if isinstance(value, int | float):
        return Length(value=float(value), unit=unit)  # type: ignore[arg-type]
    match = LENGTH.match(str(value))
    if not match:
        raise ValueError(
            f"{value!r} is not a length; write for example '1000 steps', '51M samples', '0.5 epochs'"
        )
    number, suffix, word = match.groups()
    name = {"step": "steps", "sample": "samples", "epoch": "epochs"}.get(word or "", word or unit)
    return Length(value=float(number) * SUFFIXES[suffix], unit=name)  # type: ignore[arg-type]


def parse_count(value: Any) -> Any:
    """`12.8B` -> 12800000000. Raises ValueError for text that is not a number; leaves other types to pydantic."""
    if isinstance(value, str):
        match = LENGTH.match(value)
        if not match or match.group(3):
            raise ValueError(f"{value!r} is not a number; write for example 128M or 12.8B")
        return round(float(match.group(1)) * SUFFIXES[match.group(2)])
    return value


Duration = Annotated[Length, BeforeValidator(parse_length), PlainSerializer(str, return_type=str)]
Count = Annotated[int, BeforeValidator(parse_count)]
