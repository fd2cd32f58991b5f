"""Resolves a recipe: stages over defaults, KEY=VALUE overrides over stages; remembers which override set a key.

Maps merge, lists and scalars replace, null removes; another `objective.kind` (or `text.format`, see variants.py)
removes the keys that the new one does not have. The result is still untyped; load.py validates it.
"""

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
from pretrain.recipe.schema_errors import did_you_mean, suggest_key
from pretrain.recipe.variants import key_names, variants_at
from pretrain.recipe.yaml_file import Document, Key, whole_value

# Section -> keys of which at most one may be set: setting one removes the others.
EXCLUSIVE: dict[Key, tuple[str, ...]] = {
    ("train",): ("steps", "samples", "epochs"),
    ("optimizer",): ("lr", "lr_per_256"),
    (): ("init", "continue"),
}
SECTIONS = tuple(info.alias or name for name, info in TrainStage.model_fields.items())
STAGE_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
RESERVED = {*SECTIONS, "run", "stages", "prepare"}


@dataclass(frozen=True)
class Override:
    """One `KEY=VALUE` of the command line; with stage None it applies to every selected training stage."""

    text: str
    stage: str | None
    key: Key
    value: Any


@dataclass
class Draft:
    """An unvalidated recipe: raw stages, and which override set which key."""

    document: Document
    run: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    set_by: dict[tuple[str, Key], str] = field(default_factory=dict)  # (stage or "run", key) -> override

    def location(self, stage: str, key: Key) -> str:
        """`recipe.yaml:12: stages.tuned.train.steps`, or the override that set or removed the key."""
        for (by_stage, by_key), text in self.set_by.items():
            if by_stage == stage and by_key[:-1] == key:
                return f"override {text!r}: {'.'.join(key)}"
        for length in range(len(key), 0, -1):
            part = key[:length]
            overrides = [
                text for (by, by_key), text in self.set_by.items() if by == stage and _same_key(by_key, part)
            ]
            for text in overrides:
                return f"override {text!r}: {'.'.join(('run', *key) if stage == 'run' else key)}"
            for prefix in (("run",),) if stage == "run" else (("stages", stage), ()):
                line = self.document.line((*prefix, *part))
                if line is not None:
                    return f"{self.document.path}:{line}: {'.'.join((*prefix, *key))}"
        prefix = ("run",) if stage == "run" else ("stages", stage) if "stages" in self.document.values else ()
        line = self.document.line(prefix) if prefix else None
        return f"{self.document.path}{f':{line}' if line else ''}: {'.'.join((*prefix, *key))}"


def read_draft(document: Document) -> Draft:
    """Overlay the defaults with every stage. Raises UserError for unknown sections and invalid stage names."""
    values = document.values
    allowed = {*SECTIONS, "run", "prepare", "stages"}
    unknown = [key for key in values if key not in allowed]
    if unknown:
        raise UserError(
            "\n".join(
                f"{document.location(key)}: unknown key{suggest_key(TrainStage, (key,), allowed)}"
                for key in unknown
            )
        )
    run = values.get("run") or {}
    if not isinstance(run, dict):
        where = document.location("run")
        raise UserError(f"{where}: must be a map with name, dir, seed, accept_change; found {run!r}")
    defaults = expand_short_forms({key: deepcopy(values[key]) for key in SECTIONS if key in values})
    stages = values.get("stages")
    if stages is None:
        return Draft(document, dict(run), {"main": merge_maps({}, defaults)})
    if not isinstance(stages, dict) or not stages:
        where = document.location("stages")
        raise UserError(f"{where}: must be a map from stage names to their changes; found {stages!r}")
    resolved: dict[str, dict[str, Any]] = {}
    for name, own in stages.items():
        where = document.location("stages", name)
        if not STAGE_NAME.match(name) or name in RESERVED:
            raise UserError(
                f"{where}: is not a valid stage name; use letters, digits, - and _, but not the name of a section"
            )
        if not isinstance(own or {}, dict):
            raise UserError(f"{where}: must be a map, found {own!r}; write {{}} for no changes")
        own = dict(expand_short_forms(own or {}))
        extended = own.pop("extends", None)
        if extended is not None:
            base = _extended(extended, document.location("stages", name, "extends"), own, resolved)
        elif own.get("kind", "train") == "merge":
            base = {key: value for key, value in defaults.items() if key == "eval"}
        else:
            base = defaults
        resolved[name] = merge_maps(merge_maps({}, base), own)
    return Draft(document, dict(run), resolved)


def _extended(
    other: Any, where: str, own: dict[str, Any], resolved: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The settings that a stage inherits by `extends: other`: all but where the weights come from."""
    training = [name for name, stage in resolved.items() if stage.get("kind", "train") == "train"]
    if own.get("kind", "train") != "train":
        raise UserError(f"{where}: a merge stage has no settings to extend; leave it out")
    if other not in training:
        known = f"the training stages before it are {', '.join(training)}" if training else "there are none"
        raise UserError(
            f"{where}: {other!r} is not a training stage before this one{did_you_mean(str(other), training)}; {known}"
        )
    return {key: value for key, value in resolved[other].items() if key not in ("init", "continue")}


def parse_override(text: str, stages: Iterable[str]) -> Override:
    """`tuned.train.steps=5` -> Override. Raises UserError for text that is not KEY=VALUE or for an unknown section."""
    stages = list(stages)
    name, equals, raw = text.partition("=")
    key = tuple(name.strip().split("."))
    if not equals or not all(key):
        raise UserError(
            f"override {text!r}: write KEY=VALUE, for example train.steps=500 or {stages[0]}.train.steps=500"
        )
    try:
        value = whole_value(raw)
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
    suggestion = suggest_key(TrainStage, key[:1], [*SECTIONS, "run", *stages])
    raise UserError(
        f"override {text!r}: {key[0]!r} is neither a section of a recipe nor a stage of this one{suggestion}"
    )


def apply_override(draft: Draft, override: Override, selected: Sequence[str], strict: bool) -> None:
    """Apply one override to the draft and record it in `set_by`."""
    if override.stage is None and override.key[0] == "run":
        if len(override.key) != 2:
            raise UserError(f"override {override.text!r}: write run.KEY=VALUE, for example run.seed=1")
        set_key(draft.run, Override(override.text, None, override.key[1:], override.value))
        draft.set_by["run", override.key[1:]] = override.text
        return
    if strict and override.stage is not None and override.stage not in selected:
        raise UserError(
            f"override {override.text!r}: stage {override.stage!r} is not selected, so it would change nothing; "
            f"selected: {', '.join(selected)}"
        )
    if override.key[0] == "run":
        raise UserError(
            f"override {override.text!r}: run.* belongs to the whole run; write it without the stage"
        )
    for name in target_stages(override, draft.stages, selected, strict):
        set_key(draft.stages[name], override)
        draft.stages[name] = expand_short_forms(draft.stages[name])
        draft.set_by[name, override.key] = override.text


def merge_maps(base: dict[str, Any], over: dict[str, Any], at: Key = ()) -> dict[str, Any]:
    """A copy of `base` overlaid with `over`: maps merge, lists and scalars replace, null removes."""
    result = dict(base)
    variants = variants_at(at)
    if variants is not None:
        name = over.get(variants.selector)
        if name not in (None, base.get(variants.selector, variants.default)):
            # The keys that only another kind has mean nothing here.
            chosen = variants.classes().get(str(name))
            kept = key_names(chosen) if chosen is not None else []
            result = {key: value for key, value in base.items() if key in kept}
    remove_alternatives(result, over, at)
    for key, value in over.items():
        old = result.get(key)
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            result[key] = merge_maps(old if isinstance(old, dict) else {}, value, (*at, key))
        else:
            result[key] = deepcopy(value)
    return result


def remove_alternatives(base: dict[str, Any], over: dict[str, Any], at: Key) -> None:
    """Remove from `base` the exclusive keys that a key of the same group in `over` replaces."""
    group = EXCLUSIVE.get(at, ())
    if any(over.get(name) is not None for name in group):
        for name in group:
            base.pop(name, None)


def expand_short_forms(stage: dict[str, Any]) -> dict[str, Any]:
    """Expand `train: 500 steps` into `train: {steps: 500}`."""
    train = stage.get("train")
    if train is None or isinstance(train, dict):
        return stage
    try:
        length = parse_length(train)
    except ValueError:
        return stage  # the schema reports the mistake
    if not isinstance(length, Length):
        return stage
    value: int | float = int(length.value) if length.value.is_integer() else length.value
    return {**stage, "train": {length.unit: value}}


def target_stages(
    override: Override, stages: dict[str, dict[str, Any]], selected: Sequence[str], strict: bool = True
) -> list[str]:
    """The names of the stages that an override changes. Raises UserError if there are none.

    A rank of one stage receives the overrides of all stages of the run, so it is not `strict`: an override of a
    stream that only other stages have is ignored.
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
    # Only stages that have the stream: an override must not recreate a stream that the stage removed.
    with_stream = [name for name in training if override.key[1] in (stages[name].get("data") or {})]
    changed = [name for name in chosen if name in with_stream]
    if not changed and (strict or not with_stream):
        known = sorted({stream for name in chosen for stream in (stages[name].get("data") or {})})
        raise UserError(
            f"override {override.text!r}: no stream {override.key[1]!r} in {', '.join(chosen)}"
            f"{did_you_mean(override.key[1], known)}; streams: {', '.join(known) or 'none'}"
        )
    return changed


def set_key(stage: dict[str, Any], override: Override) -> None:
    """Set one key of a raw stage in place: the value replaces the old one, null removes the key."""
    *parents, last = override.key
    node: Any = stage
    for depth, name in enumerate(parents):
        if override.value is None and isinstance(node, dict) and node.get(name) is None:
            return  # nothing to remove; _descend would create an empty section
        node = _descend(node, name, override.key[:depth], override)
    if isinstance(node, list):
        node[_index(node, last, override)] = override.value
        return
    remove_alternatives(node, {last: override.value}, tuple(parents))
    if override.value is None:
        node.pop(last, None)
    else:
        node[last] = deepcopy(override.value)


def _descend(node: Any, name: str, at: Key, override: Override) -> Any:
    """The map or list under `name`, created if absent; short forms on the path are expanded in place."""
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
        inner = node[name] = [inner]  # a single tower may be written without the list
    if inner is None:
        inner = node[name] = {}
    elif isinstance(inner, str) and at and at[-1] == "sources":
        inner = node[name] = {"path": inner}
    elif isinstance(inner, list) and len(inner) == 1 and isinstance(inner[0], dict):
        inner = inner if following.isdigit() else inner[0]  # `model.vision.width` works with a single tower
    elif not isinstance(inner, dict | list):
        raise UserError(f"override {override.text!r}: {'.'.join((*at, name))} holds {inner!r}, not a section")
    return inner


def _index(items: list[Any], name: str, override: Override) -> int:
    if name.isdigit() and int(name) < len(items):
        return int(name)
    raise UserError(
        f"override {override.text!r}: {name!r} is not an index of a list of {len(items)}; "
        f"write a number from 0 to {len(items) - 1}"
    )


def _same_key(a: Key, b: Key) -> bool:
    """True if the keys are equal when list indices are ignored: `model.vision.width` is `model.vision.0.width`."""
    names = [tuple(part for part in key if not part.isdigit()) for key in (a, b)]
    return a == b or names[0] == names[1]
