"""The small files of a run folder, as far as they are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def json_mapping(path: Path) -> dict[str, Any]:
    """What a JSON file maps; empty where it is absent, damaged or no mapping."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
