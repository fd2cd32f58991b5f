"""metrics.jsonl: one object a step, cut at the checkpoint on resume; and the limit on replaced samples."""

from __future__ import annotations

import json
import os
from collections import deque
from pathlib import Path
from typing import Any

from data_pipeline.storage.files import publish

WINDOW = 100
"""Steps over which the fraction of replaced samples is taken."""
AT_LEAST = 200
"""Samples of a source that must have been seen before its fraction counts."""


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


class TooManyBad(RuntimeError):
    """The share of replaced samples of a source passed the recipe's limit."""


class BadFraction:
    """Watches the share of a source's samples that were replaced over the last steps, summed over ranks.

    `before` is the `state` that a checkpoint kept, so that a resumed run judges as an undisturbed one.
    """

    def __init__(self, limit: float, before: dict[str, list[list[int]]] | None = None) -> None:
        self.limit = limit
        self.steps: dict[str, deque[list[int]]] = {
            source: deque(window, maxlen=WINDOW) for source, window in (before or {}).items()
        }

    def state(self) -> dict[str, list[list[int]]]:
        """[served, replaced] of each of the last steps, by source."""
        return {source: list(window) for source, window in self.steps.items()}

    def add(self, step: int, samples: dict[str, int], skipped: dict[str, dict[str, int]]) -> str | None:
        """Count a step; what to tell the user when a source passes the limit, else None."""
        for source, count in sorted(samples.items()):
            window = self.steps.setdefault(source, deque(maxlen=WINDOW))
            window.append([count, sum(skipped.get(source, {}).values())])
        return self.over_limit(step, skipped)

    def over_limit(self, step: int, skipped: dict[str, dict[str, int]]) -> str | None:
        """What to tell say when a source's last steps pass the limit; `skipped` names the latest step's reasons."""
        for source, window in sorted(self.steps.items()):
            seen, bad = sum(s for s, _ in window), sum(b for _, b in window)
            if seen >= AT_LEAST and bad > self.limit * seen:
                listed = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.get(source, {}).items()))
                return (
                    f"step {step}: {bad} of the last {seen} samples of {source} were replaced, more than "
                    f"loader.max_bad_fraction {self.limit:g}{f' ({listed} in this step)' if listed else ''}. "
                    f"bad_samples.jsonl names them. Mend the source, or raise loader.max_bad_fraction."
                )
        return None
