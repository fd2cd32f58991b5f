"""How maps are laid over each other: stages over the defaults, and KEY=VALUE overrides over the stages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import yaml

from data_pipeline.errors import UserError
from pretrain.recipe.fields import Length, parse_length
from pretrain.recipe.schema import TrainStage
from pretrain.recipe.schema_errors import hint, nearest
from pretrain.recipe.yaml_file import Document, Key, parse_scalar

# Where one of these is written, the others that stood there before give way.
EXCLUSIVE: dict[Key, tuple[str, ...]] = {
    ("train",): ("steps", "samples", "epochs"),
    ("optimizer",): ("lr", "lr_per_256"),
    (): ("init", "continue"),
}
SECTIONS = tuple(info.alias or name for name, info in TrainStage.model_fields.items())


def merge_maps(base: dict[str, Any], over: dict[str, Any], at: Key = ()) -> dict[str, Any]:
    """`over` laid on `base`: maps merge, lists and scalars replace, null removes."""
    result = dict(base)
    give_way(result, over, at)
    for key, value in over.items():
        old = result.get(key)
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            result[key] = merge_maps(old if isinstance(old, dict) else {}, value, (*at, key))
        else:
            result[key] = deepcopy(value)
    return result


def give_way(base: dict[str, Any], over: dict[str, Any], at: Key) -> None:
    """Remove from `base` what a member of the same exclusive group in `over` replaces."""
    group = EXCLUSIVE.get(at, ())
    if any(over.get(name) is not None for name in group):
        for name in group:
            base.pop(name, None)


def normalise(stage: dict[str, Any]) -> dict[str, Any]:
    """Write the short forms out: `train: 500 steps`, and a null section that inherits nothing."""
    train = stage.get("train")
    if train is None or isinstance(train, dict):
        return stage
    try:
        length = parse_length(train)
    except ValueError:
        return stage  # the schema says what is wrong with it
    if not isinstance(length, Length):
        return stage
    value: int | float = int(length.value) if length.value.is_integer() else length.value
    return {**stage, "train": {length.unit: value}}


@dataclass(frozen=True)
class Override:
    """One `KEY=VALUE` of the command line; without a stage it holds for every selected training stage."""

    text: str
    stage: str | None
    key: Key
    value: Any


def parse_override(text: str, stages: Iterable[str]) -> Override:
    """`tuned.train.steps=5` -> Override; UserError when it is no KEY=VALUE or names nothing that exists."""
    stages = list(stages)
    name, equals, raw = text.partition("=")
    key = tuple(name.strip().split("."))
    if not equals or not all(key):
        raise UserError(
            f"override {text!r}: write KEY=VALUE, for example train.steps=500 or {stages[0]}.train.steps=500"
        )
    try:
        value = parse_scalar(raw)
    except (yaml.YAMLError, ValueError) as error:
        problem = getattr(error, "problem", None) or error
        raise UserError(
            f"override {text!r}: the value is not YAML: {problem}; quote it for the shell"
        ) from None
    if key[0] in stages:
        if len(key) == 1:
            raise UserError(f"override {text!r}: names a stage but no key in it; write {key[0]}.KEY=VALUE")
        return Override(text, key[0], key[1:], value)
    if key[0] == "stages":
        raise UserError(
            f"override {text!r}: write STAGE.KEY=VALUE without `stages.`; the stages are {', '.join(stages)}"
        )
    if key[0] == "run" or key[0] in SECTIONS:
        return Override(text, None, key, value)
    near = hint(TrainStage, key[:1], [*SECTIONS, "run", *stages])
    raise UserError(
        f"override {text!r}: {key[0]!r} is neither a section of a recipe nor a stage of this one{near}"
    )


def set_key(stage: dict[str, Any], override: Override) -> None:
    """Set one key of a raw section in place: the value replaces what stood there; null removes."""
    *parents, last = override.key
    node: Any = stage
    for depth, name in enumerate(parents):
        if override.value is None and isinstance(node, dict) and node.get(name) is None:
            return  # nothing to remove, and an empty section would not be nothing
        node = _descend(node, name, override.key[:depth], override)
    if isinstance(node, list):
        node[_index(node, last, override)] = override.value
        return
    give_way(node, {last: override.value}, tuple(parents))
    if override.value is None:
        node.pop(last, None)
    else:
        node[last] = deepcopy(override.value)


def _descend(node: Any, name: str, at: Key, override: Override) -> Any:
    """The map or list under `name`, made where there is none; short forms are written out on the way."""
    if isinstance(node, list):
        inner = node[_index(node, name, override)]
        if not isinstance(inner, dict | list):
            raise UserError(
                f"override {override.text!r}: {'.'.join((*at, name))} holds {inner!r}, not a section"
            )
        return inner
    inner = node.get(name)
    following = override.key[len(at) + 1]
    if (*at, name) == ("model", "vision") and isinstance(inner, dict) and following.isdigit():
        inner = node[name] = [inner]  # one tower may be written without the list
    if inner is None:
        inner = node[name] = {}
    elif isinstance(inner, str) and at and at[-1] == "sources":
        inner = node[name] = {"path": inner}
    elif isinstance(inner, list) and len(inner) == 1 and isinstance(inner[0], dict):
        inner = inner if following.isdigit() else inner[0]  # `model.vision.width` where there is one tower
    elif not isinstance(inner, dict | list):
        raise UserError(f"override {override.text!r}: {'.'.join((*at, name))} holds {inner!r}, not a section")
    return inner


def _index(items: list[Any], name: str, override: Override) -> int:
    if name.isdigit() and int(name) < len(items):
        return int(name)
    raise UserError(
        f"override {override.text!r}: {name!r} is no element of a list of {len(items)}; "
        f"write a number from 0 to {len(items) - 1}"
    )


def targets(
    override: Override, stages: dict[str, dict[str, Any]], selected: Sequence[str], strict: bool = True
) -> list[str]:
    """The stages that an override sets; UserError when it would set none.

    Not strict is the view of one rank of a chain, which is handed the overrides of every stage.
    """
    training = [name for name, stage in stages.items() if stage.get("kind", "train") == "train"]
    if override.stage is None and override.key[0] == "loader":
        return training
    chosen = [override.stage] if override.stage else [name for name in selected if name in training]
    if not chosen:
        raise UserError(
            f"override {override.text!r}: no training stage is selected; "
            f"write STAGE.KEY=VALUE for one of {', '.join(stages)}"
        )
    if override.key[0] != "data" or len(override.key) < 3:
        return chosen
    # A stage that has removed a stream is not given half of it back.
    having = [name for name in training if override.key[1] in (stages[name].get("data") or {})]
    found = [name for name in chosen if name in having]
    if not found and (strict or not having):
        known = sorted({stream for name in chosen for stream in (stages[name].get("data") or {})})
        raise UserError(
            f"override {override.text!r}: there is no stream {override.key[1]!r} in {', '.join(chosen)}"
            f"{nearest(override.key[1], known)}; streams: {', '.join(known) or 'none'}"
        )
    return found


STAGE_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
RESERVED = {*SECTIONS, "run", "stages", "prepare"}


@dataclass
class Draft:
    """A recipe on its way: raw stages, and who wrote which key."""

    document: Document
    run: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    set_by: dict[tuple[str, Key], str] = field(default_factory=dict)  # (stage or "run", key) -> override

    def where(self, stage: str, key: Key) -> str:
        """`recipe.yaml:12: stages.tuned.train.steps`, or the override that set (or removed) the key."""
        for (by_stage, by_key), text in self.set_by.items():
            if by_stage == stage and by_key[:-1] == key:
                return f"override {text!r}: {'.'.join(key)}"
        for length in range(len(key), 0, -1):
            part = key[:length]
            found = [
                text for (by, by_key), text in self.set_by.items() if by == stage and _same(by_key, part)
            ]
            for text in found:
                return f"override {text!r}: {'.'.join(('run', *key) if stage == 'run' else key)}"
            for prefix in (("run",),) if stage == "run" else (("stages", stage), ()):
                line = self.document.line((*prefix, *part))
                if line is not None:
                    return f"{self.document.path}:{line}: {'.'.join((*prefix, *key))}"
        prefix = ("run",) if stage == "run" else ("stages", stage) if "stages" in self.document.values else ()
        line = self.document.line(prefix) if prefix else None
        return f"{self.document.path}{f':{line}' if line else ''}: {'.'.join((*prefix, *key))}"


def _same(one: Key, other: Key) -> bool:
    """Equal, or equal but for the places in lists: `model.vision.width` is `model.vision.0.width`."""
    names = [tuple(part for part in key if not part.isdigit()) for key in (one, other)]
    return one == other or names[0] == names[1]


def read_draft(document: Document) -> Draft:
    """Lay every stage over the defaults."""
    values = document.values
    allowed = {*SECTIONS, "run", "prepare", "stages"}
    unknown = [key for key in values if key not in allowed]
    if unknown:
        raise UserError(
            "\n".join(
                f"{_at(document, key)}: unknown key{hint(TrainStage, (key,), allowed)}" for key in unknown
            )
        )
    run = values.get("run") or {}
    if not isinstance(run, dict):
        raise UserError(f"{_at(document, 'run')}: is a section with name, dir, seed, not {run!r}")
    defaults = normalise({key: deepcopy(values[key]) for key in SECTIONS if key in values})
    stages = values.get("stages")
    if stages is None:
        return Draft(document, dict(run), {"main": merge_maps({}, defaults)})
    if not isinstance(stages, dict) or not stages:
        raise UserError(f"{_at(document, 'stages')}: is a map from a stage's name to what it changes")
    resolved: dict[str, dict[str, Any]] = {}
    for name, own in stages.items():
        here = _at(document, "stages", name)
        if not STAGE_NAME.match(name) or name in RESERVED:
            raise UserError(
                f"{here}: is no name for a stage; use letters, digits, - and _, and no section's name"
            )
        if not isinstance(own or {}, dict):
            raise UserError(f"{here}: holds {own!r}; a stage is a map, {{}} when it changes nothing")
        own = normalise(own or {})
        merging = own.get("kind", "train") == "merge"
        base = {key: value for key, value in defaults.items() if key == "eval"} if merging else defaults
        resolved[name] = merge_maps(merge_maps({}, base), own)
    return Draft(document, dict(run), resolved)


def _at(document: Document, *key: str) -> str:
    line = document.line(key)
    return f"{document.path}{f':{line}' if line else ''}: {'.'.join(key)}"


def apply_override(draft: Draft, override: Override, selected: Sequence[str], strict: bool) -> None:
    """Set one override in the draft, and remember that it did."""
    if override.stage is None and override.key[0] == "run":
        if len(override.key) != 2:
            raise UserError(f"override {override.text!r}: write run.KEY=VALUE, for example run.seed=1")
        set_key(draft.run, Override(override.text, None, override.key[1:], override.value))
        draft.set_by["run", override.key[1:]] = override.text
        return
    if strict and override.stage is not None and override.stage not in selected:
        raise UserError(
            f"override {override.text!r}: stage {override.stage!r} is not selected, so it would do nothing; "
            f"selected: {', '.join(selected)}"
        )
    if override.key[0] == "run":
        raise UserError(
            f"override {override.text!r}: run.* belongs to the whole run; write it without the stage"
        )
    for name in targets(override, draft.stages, selected, strict):
        set_key(draft.stages[name], override)
        draft.stages[name] = normalise(draft.stages[name])
        draft.set_by[name, override.key] = override.text
