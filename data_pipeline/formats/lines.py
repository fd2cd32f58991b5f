"""Lines of a file in constant memory: a line that is too long is skipped and told, not held."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

LONGEST = 8 << 20


def lines(file: BinaryIO, longest: int = LONGEST) -> Iterator[tuple[int, bytes | None]]:
    """(number from 1, the line without its end); None in the place of a line of more than `longest` bytes."""
    number = 0
    while line := file.readline(longest + 2):
        number += 1
        content = line.rstrip(b"\r\n")
        if len(content) <= longest:
            yield number, content
            continue
        while not line.endswith(b"\n"):
            line = file.readline(longest)
            if not line:
                break
        yield number, None
