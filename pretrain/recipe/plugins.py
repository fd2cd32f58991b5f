"""Objective kinds, text formats, encoders, measures and exports that another package adds to the dicts of Dromos.

The environment variable DROMOS_PLUGINS names its modules, separated by commas. Every process that reads a recipe
imports them first: commands, ranks, jobs. (Loader workers need no list: a text format reaches them as a pickled object,
whose module they import.) A recipe itself never names code.
"""

from __future__ import annotations

import os
from importlib import import_module

from data_pipeline.errors import UserError

VARIABLE = "DROMOS_PLUGINS"


def import_plugins() -> None:
    """Import the modules that DROMOS_PLUGINS names; each adds its entries at its first import. Raises UserError."""
    for name in os.environ.get(VARIABLE, "").split(","):
        if not name.strip():
            continue
        try:
            import_module(name.strip())
        except ImportError as error:
            raise UserError(
                f"{VARIABLE}: {name.strip()} cannot be imported: {error}; correct the name, or add its folder to "
                "PYTHONPATH, on every node"
            ) from error
