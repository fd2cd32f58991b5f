"""Reads an `objective` section as the options of its kind."""

from __future__ import annotations

from typing import Any

from pretrain.recipe.fields import parse_variant
from pretrain.recipe.kinds import KINDS

# What a kind was called when recipes named the paper instead of the objective.
FORMER_NAMES = {"flip": "contrastive", "sphinx": "generative", "instruct": "generative"}


def parse_objective(value: Any) -> Any:
    """An `objective` section as the options of its kind. Raises ValidationError at the key that is wrong."""
    options = {name: spec.options for name, spec in KINDS.items()}
    return parse_variant(value, "kind", options, former=FORMER_NAMES)
