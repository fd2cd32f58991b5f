"""metrics.jsonl: one object a step, cut at the checkpoint on resume; and the limit on replaced samples."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from data_pipeline.storage.files import publish


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics file; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def cut(path: Path, step: int) -> None:
    """Drop what was logged after `step`: those steps are done again."""
    if not path.exists():
        return
    kept = [row for row in read(path) if row["step"] <= step]
    publish(path, "".join(json.dumps(row) + "\n" for row in kept).encode())


class Log:
    """Appends objects to a JSON-lines file and flushes each."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a")  # noqa: SIM115  (closed by close())

    def write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        if not self.file.closed:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
