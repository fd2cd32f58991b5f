"""Names and small files of a run folder: step_XXXXXXXX, COMPLETE, JSON files. No torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.errors import UserError
from pretrain.recipe import SCHEMA

STEP = re.compile(r"^step_(\d{8,})$")
LEFT_OUT = "left_out.json"  # in a stage's folder: source -> reason -> files in its tars that are in no sample


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


def read_mapping(path: Path, advice: str) -> dict[str, Any] | None:
    """The mapping in a JSON file; None if the file is absent. A damaged one is a UserError that ends in `advice`."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not valid JSON; {advice}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds a {type(content).__name__}, not an object; {advice}")
    return content


def read_record(stage_dir: Path, any_schema: bool = False) -> dict[str, Any] | None:
    """The content of a stage's resolved.yaml; None if the stage has not started.

    any_schema: also of a version with other recipes, for a reader that builds no model from it, such as a merge

    Raises UserError if the file is damaged or of another schema.
    """
    path = stage_dir / "resolved.yaml"
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError, ValueError) as error:
        problem = getattr(error, "problem", None) or error
        raise UserError(
            f"{path}: cannot be read: {problem}; delete {stage_dir} to start the stage again"
        ) from None
    if not isinstance(record, dict) or not isinstance(record.get("stage"), dict):
        raise UserError(f"{path} is not a valid stage record; delete {stage_dir} to start the stage again")
    if not any_schema and record.get("schema") != SCHEMA:
        raise UserError(
            f"{path} was written by a version of Dromos with other recipes (schema {record.get('schema', 1)}, this "
            f"version has {SCHEMA}); use that version, or train the stage again in another folder (run.dir=NEW)"
        )
    return record


def json_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty if the file is absent, damaged or holds another type."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
