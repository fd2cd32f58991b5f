"""Lines of a file in constant memory: a line that is too long is skipped and told, not held."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from data_pipeline import storage

LONGEST = 8 << 20
SKIP = 1 << 16


@contextmanager
def reading(path: str) -> Iterator[BinaryIO]:
    """The file opened, with the readline of a local one: a remote one's cannot be bounded."""
    with storage.asking(path), storage.open_bytes(path) as file:
        if isinstance(file, io.BufferedReader):
            yield file
        else:
            with io.BufferedReader(cast(io.RawIOBase, file), 1 << 20) as buffered:
                yield buffered


def lines(file: BinaryIO, longest: int = LONGEST) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, the line without its end); None in the place of a line of more than `longest` bytes."""
    number = 0
    while line := file.readline(longest + 2):
        number += 1
        line, ended = line.rstrip(b"\r\n"), line.endswith(b"\n")
        if len(line) <= longest:
            yield number, line
            continue
        while not ended:
            line = file.readline(SKIP)
            ended = line.endswith(b"\n") or not line
        yield number, None
