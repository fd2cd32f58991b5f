"""Checks by recorded origins whether the inputs of a merge share an ancestor."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash
import yaml

from pretrain.merge.merge_plan import letter
from pretrain.weights.source import WeightSource

MAX_DEPTH = 20  # generations of recorded parents


def duplicate_notes(sources: Sequence[WeightSource]) -> list[str]:
    """A note for weights that are named twice, usually by mistake."""
    places: dict[str, list[str]] = {}
    for number, source in enumerate(sources):
        path = source.located.path
        place = path if "://" in path or source.located.kind == "hf" else os.path.realpath(path)
        places.setdefault(place, []).append(f"{letter(number)} ({source.address})")
    return [f"{' and '.join(same)} are the same weights" for same in places.values() if len(same) > 1]


def lineage_notes(sources: Sequence[WeightSource]) -> list[str]:
    """A note for each pair of inputs that have recorded ancestors but no common one: their mean is rarely good."""
    known = [(source.address, ancestors(source)) for source in sources]
    recorded = [(address, found) for address, found in known if found]
    notes = []
    for number, (address, found) in enumerate(recorded):
        for other, theirs in recorded[:number]:
            if not found & theirs:
                notes.append(
                    f"{other} and {address} share no ancestor in their records ({', '.join(sorted(theirs))}; "
                    f"{', '.join(sorted(found))}): weights of unrelated trainings rarely merge into a good model"
                )
    return notes


def ancestors(source: WeightSource) -> set[str]:
    """The weights themselves and all recorded ancestors: stages of runs and outside weights. Empty without records."""
    stage = source.located.stage_dir
    if stage is None and "://" in source.located.path:
        return set(source.lineage)
    start = stage if stage is not None else Path(source.located.path)
    return _ancestors(start, MAX_DEPTH) | source.lineage


def _ancestors(folder: Path, depth: int) -> set[str]:
    found: set[str] = set()
    parents: list[str] = []
    if (content := _read(folder / "resolved.yaml")) is not None:
        stage = content.get("stage", {})
        found.add(_stage_id(folder))
        parents += list(_parent_addresses(stage))
    if (record := _read(folder / "merge.json")) is not None:
        inputs = record.get("inputs")
        listed = inputs if isinstance(inputs, list) else []
        paths = [entry.get("path") for entry in listed if isinstance(entry, dict)]
        parents += [path for path in paths if isinstance(path, str)]
        found |= {_stage_id(folder)} if parents else set()
    for parent in parents:
        found |= _ancestors_of_parent(parent, folder, depth)
    return found


def _ancestors_of_parent(parent: str, folder: Path, depth: int) -> set[str]:
    """A parent and its ancestors; the parent is a stage of the same run, a stage elsewhere, or an outside address."""
    name = parent.partition("@")[0]
    if "://" in name:
        return {name}
    candidates = [folder.parent / name, folder.parent.parent / name, Path(name)]
    for candidate in candidates:
        place = candidate.parent.parent if candidate.parent.name == "checkpoints" else candidate
        if depth and place.is_dir() and place.resolve() != folder.resolve():
            return {_stage_id(place)} | _ancestors(place, depth - 1)
    return {name}


def _stage_id(folder: Path) -> str:
    """RUN/STAGE and a hash of the full path. Records are published, so they must not contain a user's home folder."""
    place = folder.resolve()
    return f"{place.parent.name}/{place.name}#{xxhash.xxh64_hexdigest(os.fsencode(place))[:8]}"


def _parent_addresses(value: Any) -> list[str]:
    """All addresses under `init`, `continue` or `inputs` of a stage."""
    if not isinstance(value, dict):
        return []
    found: list[str] = []
    for key, inner in value.items():
        if key in ("init", "continue") and isinstance(inner, str):
            found.append(inner)
        elif key == "inputs" and isinstance(inner, dict):
            found += [name for name in inner if isinstance(name, str)]
        elif isinstance(inner, dict):
            found += _parent_addresses(inner)
    return found


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    except (ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None
