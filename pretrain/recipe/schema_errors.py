"""pydantic's errors as one line each, with the nearest existing key."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from pretrain.recipe.sections.evaluation import TASKS, Evaluation
from pretrain.recipe.variants import variants_at, variants_of
from pretrain.recipe.yaml_file import Key

TYPE_NAMES = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "dict_type": "a map",
    "model_type": "a section (a map of keys)",
    "model_attributes_type": "a section (a map of keys)",
    "list_type": "a list",
    "tuple_type": "a list",
}
REQUIRED_SECTIONS: dict[Key, str] = {
    ("train",): "; write exactly one of steps, samples, epochs, for example train: {steps: 1000}",
    ("objective",): "; write for example objective: {kind: contrastive}",
}


def describe(model: type[BaseModel], key: Key, error: Mapping[str, Any]) -> str:
    """The message of one pydantic error at `key` below `model`, without file and key.

    `error` is an item of `ValidationError.errors()`.
    """
    kind, value, context = error["type"], error.get("input"), error.get("ctx") or {}
    if kind == "extra_forbidden":
        return f"unknown key{suggest_key(model, key)}"
    if kind == "variant":
        return str(context["message"])
    if kind == "missing":
        return "is missing" + REQUIRED_SECTIONS.get(key, "")
    if kind == "value_error":
        return str(context.get("error", error["msg"]))
    if kind == "literal_error":
        options = [
            str(option).strip("'") for option in str(context["expected"]).replace(" or ", ", ").split(", ")
        ]
        close = difflib.get_close_matches(str(value), options, n=1)
        return f"{value!r} is none of {', '.join(options)}" + (
            f"; did you mean {close[0]!r}?" if close else ""
        )
    if kind in TYPE_NAMES:
        return f"must be {TYPE_NAMES[kind]}, not {value!r}"
    text = error["msg"]
    for start, plain in (("Input should be ", "must be "), ("Dictionary should have", "must have")):
        if text.startswith(start):
            text = plain + text.removeprefix(start)
    return f"{text}, not {value!r}" if isinstance(value, str | int | float | list | tuple) else text


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the end of a message, or an empty string if no candidate is close."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.55)
    return f"; did you mean {close[0]!r}?" if close else ""


def suggest_key(model: type[BaseModel], key: Key, allowed: Iterable[str] | None = None) -> str:
    """`; did you mean ...?` for an unknown key: a close sibling, else the same name in another section.

    `allowed` are the siblings; by default the fields of the section that holds `key`.
    """
    if len(key) == 3 and (key[0], key[2]) == ("data", "length"):  # where packed text was described before
        return (
            "; the length belongs to text: {length: ...}, and {format: packed, length: ...} for packed text"
        )
    variants = variants_at(key[:-1])
    if variants is not None and (of := variants.having(key[-1])):
        return f" of this {key[-2]}.{variants.selector}; it is a key of {' and '.join(of)}"
    siblings = fields_below(model, key[:-1]) if allowed is None else sorted(allowed)
    close = difflib.get_close_matches(key[-1], siblings, n=1, cutoff=0.7)
    if close:
        return f"; did you mean {close[0]!r}?"
    elsewhere = [path for path in dotted_keys(model) if path.rpartition(".")[2] == key[-1]]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere[:3])}?"
    close = difflib.get_close_matches(key[-1], siblings, n=1, cutoff=0.4)
    if close:
        return f"; did you mean {close[0]!r}? The keys here are {', '.join(siblings)}"
    return f"; the keys here are {', '.join(siblings)}" if siblings else ""


def fields_below(model: type[BaseModel], key: Key) -> list[str]:
    """Names of the fields of the section at `key`; empty if `key` is not a section."""
    annotation: Any = model
    for part in key:
        annotation = _child(annotation, part)
    section = _section(annotation)
    return [name for name, _ in _fields(section)] if section else []


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of the schema in dotted form, for example `data.STREAM.image.size`."""
    for name, annotation in _fields(model):
        yield prefix + name
        inner, holder = annotation, ""
        if get_origin(_bare(inner)) is dict:
            inner, holder = get_args(_bare(inner))[1], {"data": "STREAM."}.get(name, "NAME.")
        section = _section(inner)
        if section is not None:
            yield from dotted_keys(section, f"{prefix}{name}.{holder}")


def _fields(model: type[BaseModel]) -> list[tuple[str, Any]]:
    """(key in the recipe, annotation) of the fields of a section; one with variants has those of all of them."""
    variants = variants_of(model)
    classes: list[type[BaseModel]] = [model, *(variants.classes().values() if variants else ())]
    found: dict[str, Any] = {
        info.alias or name: info.annotation for one in classes for name, info in one.model_fields.items()
    }
    if model is Evaluation:
        found |= {name: dict[str, task] for name, task in TASKS.items()}  # type: ignore[valid-type]
    return list(found.items())


def _bare(annotation: Any) -> Any:
    """The annotation without Annotated and without `| None`."""
    while True:
        origin = get_origin(annotation)
        if origin is Annotated:
            annotation = get_args(annotation)[0]
        elif origin in (Union, types.UnionType):
            rest = [item for item in get_args(annotation) if item is not type(None)]
            if len(rest) != 1:
                return annotation
            annotation = rest[0]
        else:
            return annotation


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section class of an annotation, also inside a list; None for a plain value."""
    bare = _bare(annotation)
    if get_origin(bare) is list:
        bare = _bare(get_args(bare)[0])
    return bare if isinstance(bare, type) and issubclass(bare, BaseModel) else None


def _child(annotation: Any, part: str) -> Any:
    """The annotation one key below; None if there is no such key."""
    bare = _bare(annotation)
    if get_origin(bare) is dict:
        return get_args(bare)[1]
    if get_origin(bare) is list:
        bare = _bare(get_args(bare)[0])
        if part.isdigit():
            return bare
    if isinstance(bare, type) and issubclass(bare, BaseModel):
        return dict(_fields(bare)).get(part)
    return None
