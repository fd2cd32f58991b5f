"""Names of tensors without the components that wrappers of a module add, so that the model's own class loads them."""

from __future__ import annotations

from collections.abc import Iterable

# Component of a name -> what adds it, anywhere in the name.
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
PARALLEL = "module"  # DistributedDataParallel adds it in front of every name; open_clip's checkpoints keep it


def unwrapped(names: Iterable[str]) -> tuple[dict[str, str], str | None]:
    """Stored name -> name without wrappers, and a text that says what was removed; nothing if no name has any.

    `module.` is removed only if all names begin with it. Nothing is removed if two names would become equal.
    """
    stored = list(names)
    removed: dict[str, str] = {}
    short: list[list[str]] = []
    for name in stored:
        parts = name.split(".")
        found = [part for part in parts if part in WRAPPERS]
        removed |= {part: WRAPPERS[part] for part in found}
        short.append([part for part in parts if part not in WRAPPERS] if found else parts)
    while short and all(len(parts) > 1 and parts[0] == PARALLEL for parts in short):
        removed[PARALLEL] = "DistributedDataParallel"
        short = [parts[1:] for parts in short]
    new = {name: ".".join(parts) for name, parts in zip(stored, short, strict=True)}
    if not removed or len(set(new.values())) < len(new) or "" in new.values():
        return {}, None
    listed = " and ".join(f"{part}. ({by})" for part, by in removed.items())
    return new, f"read without {listed} in the names of its tensors"
