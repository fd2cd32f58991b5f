"""Which checkpoints a stage's `checkpoints/` holds: the one place that reads their names; needs no torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

STEP = re.compile(r"^step_(\d{8,})$")


def tag_of(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step in the name of a checkpoint's folder; None for every other name."""
    match = STEP.match(name)
    return int(match[1]) if match and name == tag_of(int(match[1])) else None


def is_complete(checkpoint: Path) -> bool:
    """COMPLETE is written last: what lacks it was cut short."""
    return (checkpoint / "COMPLETE").exists()


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a stage's `checkpoints/`, ascending; none where there is no folder."""
    if not folder.is_dir():
        return []
    found = ((step_of(entry.name), entry) for entry in folder.iterdir())
    return sorted(step for step, entry in found if step is not None and is_complete(entry))


def json_mapping(path: Path) -> dict[str, Any]:
    """What a JSON file maps; empty where it is absent, damaged or no mapping."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
