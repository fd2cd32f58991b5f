"""The C functions that setuptools builds beside a module when the package is installed, where there is a compiler."""

from __future__ import annotations

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any


def load_function(module: str, library: str, name: str) -> Any:
    """Function `name` of `library` beside the file `module`; None where it was not built, or for another machine."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(module).with_name(library + suffix)
        if path.exists():
            try:
                return getattr(ctypes.CDLL(str(path)), name)
            except (OSError, AttributeError):
                continue
    return None
