"""From a YAML file and overrides to a Recipe: inheritance, checks, messages with file, line and key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from data_pipeline.errors import UserError
from pretrain.recipe.checks import (
    Problem,
    check_stage,
    check_stages,
    predecessors,
    unavailable,
    world_size_check,
)
from pretrain.recipe.lengths import length_steps, main_stream, total_steps, train_length, warns
from pretrain.recipe.resolve import (
    SECTIONS,
    Override,
    merge_maps,
    nearest,
    normalise,
    parse_override,
    set_key,
    targets,
)
from pretrain.recipe.schema import MergeStage, Recipe, Run, TrainStage
from pretrain.recipe.schema_errors import describe, hint
from pretrain.recipe.yaml_file import Document, Key, load_yaml

__all__ = [
    "as_plain",
    "dump",
    "dump_plain",
    "length_steps",
    "load_recipe",
    "main_stream",
    "predecessors",
    "run_dir",
    "select",
    "stage_record",
    "total_steps",
    "train_length",
    "warns",
    "world_size_check",
]

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


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    stage: str | Sequence[str] | None = None,
    *,
    runnable: bool = True,
    strict: bool = False,
) -> Recipe:
    """Read, resolve and check a recipe; a UserError holds one line a problem.

    `stage` selects the stages that overrides without a stage's name apply to (a name, several, or
    comma-separated; None: all). `runnable` refuses, in the selected stages, what this version has not
    built yet. `strict` refuses an override of a stage that is not selected, which would do nothing.
    """
    document = load_yaml(path)
    draft = read_draft(document)
    selected = select(stage, list(draft.stages), document.path)
    parsed = [parse_override(text, draft.stages) for text in overrides]
    for override in sorted(parsed, key=lambda item: item.stage is not None):  # a stage's own word is the last
        apply_override(draft, override, selected, strict)
    recipe = validate(draft)
    problems = check_stages(recipe)
    for name, resolved in recipe.stages.items():
        problems += check_stage(name, resolved, recipe)
    if runnable and not problems:
        problems = [problem for name in selected for problem in unavailable(name, recipe.stages[name])]
    refuse(draft, problems)
    return recipe


def select(stage: str | Sequence[str] | None, names: list[str], path: str) -> list[str]:
    """The selected stages in the order of the file."""
    if stage is None:
        return names
    wanted = stage.split(",") if isinstance(stage, str) else list(stage)
    for name in wanted:
        if name not in names:
            raise UserError(
                f"{path}: no stage {name!r}{nearest(name, names)}; the stages are {', '.join(names)}"
            )
    return [name for name in names if name in wanted]


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


def validate(draft: Draft) -> Recipe:
    """The typed recipe, or every schema error at once."""
    messages: list[str] = []
    stages: dict[str, Any] = {}
    models: dict[str, type[BaseModel]] = {"train": TrainStage, "merge": MergeStage}
    for name, raw in draft.stages.items():
        kind = raw.get("kind", "train")
        if not isinstance(kind, str) or kind not in models:
            near = nearest(str(kind), models)
            messages.append(f"{draft.where(name, ('kind',))}: {kind!r} is none of train, merge{near}")
            continue
        parsed = _parse(models[kind], raw, name, draft, messages)
        if parsed is not None:
            stages[name] = parsed
    run = _parse(Run, draft.run, "run", draft, messages)
    prepare = draft.document.values.get("prepare")
    try:
        recipe = Recipe.model_construct(run=run, prepare=prepare, stages=stages)
        Recipe.model_validate({"prepare": prepare, "stages": {}})
    except ValidationError:
        messages.append(f"{_at(draft.document, 'prepare')}: {prepare!r} is none of demo")
    if messages:
        raise UserError("\n".join(dict.fromkeys(messages)))
    return recipe


def _parse(model: type[BaseModel], raw: dict[str, Any], stage: str, draft: Draft, messages: list[str]) -> Any:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            key = tuple(str(part) for part in item["loc"])
            messages.append(f"{draft.where(stage, key)}: {describe(model, key, item)}")
        return None


def refuse(draft: Draft, problems: Iterable[Problem]) -> None:
    """Raise one UserError with a line a problem, each problem once."""
    lines = dict.fromkeys(
        f"{draft.where(problem.stage, problem.key)}: {problem.text}" for problem in problems
    )
    if lines:
        raise UserError("\n".join(lines))


def run_dir(recipe: Recipe) -> Path:
    """The run folder: run.dir, else runs/NAME."""
    return Path(recipe.run.dir) if recipe.run.dir else Path("runs") / recipe.run.name


def as_plain(recipe: Recipe, stage: str | None = None) -> dict[str, Any]:
    """The resolved recipe as plain data, itself a valid recipe; `stage` narrows it to one stage."""
    plain = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    if stage is not None:
        select(stage, list(recipe.stages), "the recipe")
        plain["stages"] = {stage: plain["stages"][stage]}
    return plain


def stage_record(recipe: Recipe, stage: str) -> dict[str, Any]:
    """What resolved.yaml holds for one stage: `name`, `run` and `stage`."""
    plain = as_plain(recipe, stage)
    return {"name": stage, "run": plain["run"], "stage": plain["stages"][stage]}


def dump(recipe: Recipe, stage: str | None = None) -> str:
    """The resolved recipe (one stage: as in its resolved.yaml) as YAML."""
    return dump_plain(as_plain(recipe) if stage is None else stage_record(recipe, stage))


def dump_plain(values: dict[str, Any]) -> str:
    """Plain data as YAML: the order kept, leaves on one line."""
    return yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True
    )


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True
