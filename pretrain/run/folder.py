"""Names and small files of a run folder: step_XXXXXXXX, COMPLETE, JSON files. No torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

STEP = re.compile(r"^step_(\d{8,})$")


def tag_of(step: int) -> str:
    """The folder name of the checkpoint of a step: step_XXXXXXXX."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step in a checkpoint's folder name; None for any other name."""
    match = STEP.match(name)
    return int(match[1]) if match and name == tag_of(int(match[1])) else None


def is_complete(checkpoint: Path) -> bool:
    """True if the checkpoint has a file COMPLETE, which is written last."""
    return (checkpoint / "COMPLETE").exists()


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a stage's `checkpoints/`, ascending; empty if the folder does not exist."""
    if not folder.is_dir():
        return []
    entries = ((step_of(entry.name), entry) for entry in folder.iterdir())
    return sorted(step for step, entry in entries if step is not None and is_complete(entry))


def json_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty if the file is absent, damaged or holds another type."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
