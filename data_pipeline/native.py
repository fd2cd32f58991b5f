"""Finds the compiled C functions that the build placed beside a module.

setuptools compiles them when the package is installed, if the machine has a C compiler; every one is optional.
"""

from __future__ import annotations

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any


def load_function(module: str, library: str, name: str) -> Any:
    """C function `name` of `library` beside the file `module`; None if it was not built, or for another machine."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(module).with_name(library + suffix)
        if path.exists():
            try:
                return getattr(ctypes.CDLL(str(path)), name)
            except (OSError, AttributeError):
                continue
    return None
