"""JSON-lines logs of a stage (metrics.jsonl, bad_samples.jsonl): append, read, truncate to a step."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from data_pipeline.storage.durable import make_folder, sync, write_errors
from data_pipeline.storage.files import publish

BLOCK_BYTES = 1 << 14  # read from the end of a log to find its last line


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a log. Damaged lines are left out: a killed process may leave a partial last line."""
    return read_with_damage(path)[0]


def parse(line: bytes) -> dict[str, Any] | None:
    """The object in a line of a log; None if the line is damaged or its object has no step."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def truncate(path: Path, step: int, last_line: str | None = None) -> list[int]:
    """Remove the objects after `step` and damaged lines, atomically; a resume at `step` repeats those steps.

    last_line: the object of `step` as the checkpoint has it. It is appended if the log lacks that step: a power cut
               while `JsonLog.amend` overwrote it can damage it, and no step before it.

    Returns the numbers of the damaged lines, without a partial last line and one that `last_line` replaces.
    """
    rows, damaged = read_with_damage(path)
    kept = [row for row in rows if row["step"] <= step]
    lines = [json.dumps(row) for row in kept]
    if last_line is not None and (not kept or kept[-1]["step"] < step):
        lines.append(last_line)
        damaged = damaged[:-1]
    elif not path.exists():
        return []
    publish(path, "".join(line + "\n" for line in lines).encode())
    return damaged


def valid_json(value: Any) -> Any:
    """`value` with None in place of every number that is not finite: JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: valid_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [valid_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_with_damage(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The objects with a step, and the numbers of the whole lines that hold none."""
    rows: list[dict[str, Any]] = []
    damaged: list[int] = []
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return rows, damaged
    for number, line in enumerate(content.split(b"\n"), 1):
        row = parse(line)
        if row is not None:
            rows.append(row)
        elif line.strip():
            damaged.append(number)
    # The last line of the split is the one without newline.
    return rows, [number for number in damaged if number <= content.count(b"\n")]


class JsonLog:
    """Appends objects to a JSON-lines file. Each is flushed, so that it outlives a kill; `sync` is for power cuts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        make_folder(path.parent)
        # Not in append mode, in which every write goes to the end: `amend` overwrites.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115  (closed by close())
        self.file.seek(0, os.SEEK_END)
        sync(path.parent)

    def write(self, row: dict[str, Any]) -> str:
        """Append an object; returns its line."""
        line = json.dumps(valid_json(row), allow_nan=False)
        self._write_all((line + "\n").encode())
        return line

    def amend(self, row: dict[str, Any]) -> str:
        """Replace the last object by `row`, which has more fields, in place and durably; returns its line.

        In place, because these files grow for weeks, and a copy of the whole file for one line would grow with them.
        The new line is longer, so one write replaces the old one and there is no instant without a line. What a power
        cut can do is damage this line, and only this one. That loses nothing: if the checkpoint of this step is
        complete, its state.json has the line (`truncate` puts it back); if not, the step is repeated.
        """
        line = json.dumps(valid_json(row), allow_nan=False)
        self.file.seek(self._start_of_last_line())
        self._write_all((line + "\n").encode())
        self.file.truncate()
        self.sync()
        return line

    def _write_all(self, data: bytes) -> None:
        with write_errors(self.path):
            while data:  # without a buffer, a write may be short
                data = data[self.file.write(data) or 0 :]

    def _start_of_last_line(self) -> int:
        """The offset at which the last line begins; the end of the file is where the last write ended."""
        end = self.file.seek(0, os.SEEK_END)
        start = end
        tail = b""
        while start > 0:
            block = min(start, BLOCK_BYTES)
            start = self.file.seek(start - block)
            tail = self.file.read(block) + tail
            newline = tail.rfind(b"\n", 0, len(tail) - 1)
            if newline >= 0:
                return start + newline + 1
        return 0

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
