"""JSON-lines logs of a stage (metrics.jsonl, bad_samples.jsonl): append, read, truncate to a step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from data_pipeline.storage.durable import make_folder, sync, write_errors
from data_pipeline.storage.files import publish


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a log, up to the first damaged line (a killed process may leave a partial last line)."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def truncate(path: Path, step: int) -> None:
    """Remove the objects after `step`, atomically; a resume at `step` repeats those steps."""
    if not path.exists():
        return
    kept = [row for row in read(path) if row["step"] <= step]
    publish(path, "".join(json.dumps(row) + "\n" for row in kept).encode())


class JsonLog:
    """Appends objects to a JSON-lines file. Each is flushed, so that it outlives a kill; `sync` is for power cuts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        make_folder(path.parent)
        self.file = open(path, "a")  # noqa: SIM115  (closed by close())
        sync(path.parent)

    def write(self, row: dict[str, Any]) -> None:
        with write_errors(self.path):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def sync(self) -> None:
        """Write to disk (fsync)."""
        with write_errors(self.path):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Write to disk and close, also if writing fails; safe to call twice."""
        if not self.file.closed:
            try:
                self.sync()
            finally:
                with write_errors(self.path):
                    self.file.close()
