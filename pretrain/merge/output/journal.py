"""What of an output is written already: a line for every finished span, read again after a kill.

A line holds the span's digest. Whoever goes on reads the span back and believes the digest, not the line: so data and
lines may reach the disk in any order, and nothing waits for the disk.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.storage.atomic_folder import JOURNAL


@dataclass(frozen=True)
class Done:
    """One span of one tensor: its digest, and those of what was read for it, each 16 hex digits.

    overflow: elements that are not finite though all inputs are.
    """

    digest: str
    inputs: tuple[str, ...]
    overflow: int = 0


class Journal:
    """The journal in `folder`, made if there is none.

    head: what the output is made of, as JSON; `begun` is what it was when the journal began.
    done: (number of the job, number of the span) -> Done, as far as lines are whole.
    """

    def __init__(self, folder: Path, head: dict[str, Any]) -> None:
        self.path = folder / JOURNAL
        self.done: dict[tuple[int, int], Done] = {}
        self.begun = head
        whole = self._read()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._file, whole)
        if not whole:
            self._add(head)

    def _read(self) -> int:
        """Takes in what is there; bytes up to the end of the last whole line."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return 0
        whole = 0
        for number, line in enumerate(content.splitlines(keepends=True)):
            try:
                entry: Any = json.loads(line) if line.endswith(b"\n") else None
                if number == 0 and isinstance(entry, dict):
                    self.begun = entry
                else:
                    job, span, digest, inputs, overflow = entry
                    self.done[job, span] = Done(digest, tuple(inputs), int(overflow))
            except (ValueError, TypeError):
                break
            whole += len(line)
        return whole

    def add(self, job: int, span: int, done: Done) -> None:
        self.done[job, span] = done
        self._add([job, span, done.digest, done.inputs, done.overflow])

    def _add(self, entry: Any) -> None:
        os.write(self._file, json.dumps(entry, separators=(",", ":")).encode() + b"\n")

    def close(self) -> None:
        os.close(self._file)
