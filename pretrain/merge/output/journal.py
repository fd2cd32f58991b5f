"""Journal of a merge that writes to a folder: one JSON line per finished span, read when a killed merge resumes.

A line contains the span's digest. On resume, every span is read back and compared with its digest. Data and journal may
therefore reach the disk in any order, and the merge never waits for the disk (no fsync).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.storage.atomic_folder import JOURNAL


@dataclass(frozen=True)
class SpanRecord:
    """One finished span of one tensor.

    digest:   of the written bytes, 16 hex digits.
    inputs:   digests of the input spans, in the order of `TensorJob.reads`.
    overflow: number of elements that are infinite or NaN although all inputs are finite.
    """

    digest: str
    inputs: tuple[str, ...]
    overflow: int = 0


class Journal:
    """The journal in `folder`; created if it does not exist.

    head:        JSON that identifies plan and inputs; the first line of a new journal.
    stored_head: first line of the existing journal, which may belong to another plan; `head` for a new one.
    done:        (job index, span index) -> SpanRecord, up to the first incomplete line.
    """

    def __init__(self, folder: Path, head: dict[str, Any]) -> None:
        self.path = folder / JOURNAL
        self.done: dict[tuple[int, int], SpanRecord] = {}
        self.stored_head = head
        valid = self._read()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._file, valid)
        if not valid:
            self._append(head)

    def _read(self) -> int:
        """Load the existing journal; return the number of bytes up to the end of its last complete line."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return 0
        valid = 0
        for number, line in enumerate(content.splitlines(keepends=True)):
            try:
                entry: Any = json.loads(line) if line.endswith(b"\n") else None
                if isinstance(entry, dict) != (number == 0):
                    break
                if number == 0:
                    self.stored_head = entry
                else:
                    job, span, digest, inputs, overflow = entry
                    self.done[job, span] = SpanRecord(digest, tuple(inputs), int(overflow))
            except (ValueError, TypeError):
                break
            valid += len(line)
        return valid

    def add(self, job: int, span: int, record: SpanRecord) -> None:
        """Append a finished span."""
        self.done[job, span] = record
        self._append([job, span, record.digest, record.inputs, record.overflow])

    def _append(self, entry: Any) -> None:
        os.write(self._file, json.dumps(entry, separators=(",", ":")).encode() + b"\n")

    def close(self) -> None:
        os.close(self._file)
