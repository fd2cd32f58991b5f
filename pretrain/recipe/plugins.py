"""Objective kinds, text formats, encoders, measures and exports that another package adds to the dicts of Dromos.

The environment variable DROMOS_PLUGINS names its modules, separated by commas. Every process that reads a recipe
imports them first: commands, ranks, jobs. (Loader workers need no list: a text format reaches them as a pickled object,
whose module they import. Put formats into a module that imports no torch: it would take seconds and most of a GB in
each worker.) A recipe itself never names code.
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
        except (Exception, SystemExit) as error:  # anything can happen in somebody's module
            absent = isinstance(error, ModuleNotFoundError) and name.strip().startswith(error.name or "?")
            advice = "; correct the name, or add its folder to PYTHONPATH, on every node" if absent else ""
            what = f"{type(error).__name__}: {error}"
            raise UserError(f"{VARIABLE}: {name.strip()} cannot be imported: {what}{advice}") from error
