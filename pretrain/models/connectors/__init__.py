"""Connectors: how visual tokens get the width of the language model, from `model.connector` of a recipe.

`CONNECTORS` has the keys of `CONNECTOR_KINDS` (pretrain/recipe/sections/model.py). A new kind is a class of options
there, a module beside this file, and a line here.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from data_pipeline.errors import UserError
from pretrain.models.connectors.projector import Projector
from pretrain.recipe.sections.model import ConnectorOptions, LinearConnector


def build_connector(options: ConnectorOptions | None, width: int, hidden: int) -> nn.Module:
    """A new connector from visual tokens of `width` to embeddings of `hidden`. Raises UserError.

    Its forward: `[rows, n, width]` -> `[rows, n', hidden]`.
    """
    if options is None:
        raise UserError("model.connector is missing; write connector: {kind: linear, norm: true}")
    return CONNECTORS[options.kind](options, width, hidden)


def linear(options: ConnectorOptions, width: int, hidden: int) -> nn.Module:
    """A linear layer, with a norm if the recipe asks for one."""
    assert isinstance(options, LinearConnector)
    return Projector(width, hidden, options.norm)


# `model.connector.kind` -> (options, width, hidden) -> module.
CONNECTORS: dict[str, Callable[[ConnectorOptions, int, int], nn.Module]] = {"linear": linear}
