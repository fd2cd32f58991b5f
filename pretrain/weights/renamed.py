"""Names of one model in two versions of transformers: `model.layers` and `model.language_model.layers`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from pretrain.weights.dtypes import TensorInfo

# Components at the beginning of a name that versions add, drop or move.
MOVED = ("model", "language_model", "text_model", "transformer", "base_model")
MAX_MOVED = 3
SHOWN = 3  # prefixes in a note


class Tensors(Protocol):
    """A source of weights."""

    def names(self) -> list[str]: ...

    def info(self, name: str) -> TensorInfo: ...


def renamings(source: Tensors, reference: Tensors) -> dict[str, str]:
    """Name in `source` -> name of the same tensor in `reference`, if they differ only in components of MOVED.

    Empty if any two names of a model would become equal without them.
    """
    theirs = set(reference.names())
    extra = [name for name in source.names() if name not in theirs]
    if not extra:
        return {}
    own, other = _by_core(source), _by_core(reference)
    if own is None or other is None:
        return {}
    held = set(source.names())
    return {
        name: to
        for name in extra
        if (to := other.get(core(name))) is not None
        and to not in held
        and source.info(name)[1] == reference.info(to)[1]
    }


def core(name: str) -> str:
    """The name without the components of MOVED at its beginning."""
    parts = name.split(".")
    at = 0
    while at < min(MAX_MOVED, len(parts) - 1) and parts[at] in MOVED:
        at += 1
    return ".".join(parts[at:])


def described(renamed: Mapping[str, str]) -> str:
    """The prefixes of a renaming as text."""
    pairs = dict.fromkeys((_prefix(old), _prefix(new)) for old, new in renamed.items())
    listed = [f"{old or '(none)'} as {new or '(none)'}" for old, new in pairs]
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return f"{len(renamed)} tensors are read under other names: the prefix {', '.join(listed[:SHOWN])}{more}"


def _prefix(name: str) -> str:
    return name[: len(name) - len(core(name))]


def _by_core(tensors: Tensors) -> dict[str, str] | None:
    names = tensors.names()
    found = {core(name): name for name in names}
    return found if len(found) == len(names) else None
