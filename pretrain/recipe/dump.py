"""A resolved recipe as plain data and as YAML (resolved.yaml)."""

from __future__ import annotations

from typing import Any

import yaml

from pretrain.recipe import SCHEMA
from pretrain.recipe.load import select_stages
from pretrain.recipe.schema import Recipe


def as_plain(recipe: Recipe, stage: str | None = None) -> dict[str, Any]:
    """The resolved recipe as plain data, which is itself a valid recipe; `stage` keeps only that stage."""
    plain = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    if stage is not None:
        select_stages(stage, list(recipe.stages), "the recipe")
        plain["stages"] = {stage: plain["stages"][stage]}
    return plain


def stage_record(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The content of a stage's resolved.yaml: `schema`, `name`, `run` and `stage`."""
    plain = as_plain(recipe, stage)
    return {"schema": SCHEMA, "name": stage, "run": plain["run"], "stage": plain["stages"][stage]}


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, the text of a run folder's recipe.yaml."""
    return dump_plain(as_plain(recipe))


def dump_plain(values: dict[str, Any]) -> str:
    """Plain data as YAML: keys keep their order, innermost maps and lists are on one line."""
    return yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True
    )


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True
