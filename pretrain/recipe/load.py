"""`load_recipe`: read a YAML file, apply overrides, resolve stages, validate and check; one error line per problem."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from data_pipeline.errors import UserError
from pretrain.recipe.checks import Problem, check_stage, check_stages, unsupported_problems
from pretrain.recipe.plugins import import_plugins
from pretrain.recipe.resolve import Draft, apply_override, parse_override, read_draft
from pretrain.recipe.schema import MergeStage, Recipe, Run, TrainStage
from pretrain.recipe.schema_errors import describe, did_you_mean
from pretrain.recipe.yaml_file import load_yaml


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    stage: str | Sequence[str] | None = None,
    *,
    runnable: bool = True,
    strict: bool = False,
) -> Recipe:
    """Read, resolve and check a recipe. Raises one UserError with one line per problem.

    `stage` selects the stages to which overrides without a stage name apply: one name, several, or a comma-separated
    list; None: all stages. `runnable` raises for features of the selected stages that this version does not
    implement. `strict` raises for an override of a stage that is not selected, because it would change nothing.
    """
    import_plugins()
    document = load_yaml(path)
    draft = read_draft(document)
    selected = select_stages(stage, list(draft.stages), document.path)
    parsed = [parse_override(text, draft.stages) for text in overrides]
    for override in sorted(
        parsed, key=lambda item: item.stage is not None
    ):  # a stage's own override wins over a general one
        apply_override(draft, override, selected, strict)
    recipe = validate(draft)
    problems = check_stages(recipe)
    for name, resolved in recipe.stages.items():
        problems += check_stage(name, resolved, recipe)
    if runnable and not problems:
        problems = [
            problem for name in selected for problem in unsupported_problems(name, recipe.stages[name])
        ]
    raise_problems(draft, problems)
    return recipe


def select_stages(stage: str | Sequence[str] | None, names: list[str], path: str) -> list[str]:
    """The selected stages in the order of the file. Raises UserError for an unknown name."""
    if stage is None:
        return names
    chosen = stage.split(",") if isinstance(stage, str) else list(stage)
    for name in chosen:
        if name not in names:
            raise UserError(
                f"{path}: no stage {name!r}{did_you_mean(name, names)}; the stages are {', '.join(names)}"
            )
    return [name for name in names if name in chosen]


def validate(draft: Draft) -> Recipe:
    """The typed recipe. Raises one UserError with all schema errors."""
    messages: list[str] = []
    stages: dict[str, Any] = {}
    models: dict[str, type[BaseModel]] = {"train": TrainStage, "merge": MergeStage}
    for name, raw in draft.stages.items():
        kind = raw.get("kind", "train")
        if not isinstance(kind, str) or kind not in models:
            suggestion = did_you_mean(str(kind), models)
            messages.append(
                f"{draft.location(name, ('kind',))}: {kind!r} is none of train, merge{suggestion}"
            )
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
        messages.append(f"{draft.document.location('prepare')}: {prepare!r} is none of demo")
    if messages:
        raise UserError("\n".join(dict.fromkeys(messages)))
    return recipe


def _parse(model: type[BaseModel], raw: dict[str, Any], stage: str, draft: Draft, messages: list[str]) -> Any:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            key = tuple(str(part) for part in item["loc"])
            messages.append(f"{draft.location(stage, key)}: {describe(model, key, item)}")
        return None


def raise_problems(draft: Draft, problems: Iterable[Problem]) -> None:
    """Raise one UserError with one line per problem, each problem once; return if there are none."""
    lines = dict.fromkeys(
        f"{draft.location(problem.stage, problem.key)}: {problem.text}" for problem in problems
    )
    if lines:
        raise UserError("\n".join(lines))


def run_dir(recipe: Recipe) -> Path:
    """The run folder: run.dir, else runs/NAME."""
    return Path(recipe.run.dir) if recipe.run.dir else Path("runs") / recipe.run.name


def only_training_stage(path: str) -> str:
    """The name of a recipe's only training stage. Raises UserError that lists them if there are several or none."""
    recipe = load_recipe(path, runnable=False)
    names = [name for name, stage in recipe.stages.items() if isinstance(stage, TrainStage)]
    if len(names) != 1:
        raise UserError(
            f"{path}: has {len(names)} training stages; write --stage with one of {', '.join(names)}"
        )
    return names[0]
