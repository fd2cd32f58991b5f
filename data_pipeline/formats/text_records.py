"""The elements of a JSON list, or the lines of a JSONL file, one at a time: a file of gigabytes in little memory."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, TypeVar, cast

from data_pipeline import storage
from data_pipeline.errors import ContentError
from data_pipeline.formats.records import BadRecord

CHUNK = 1 << 18
# A literal, number or escape that the end of the buffer cuts is reported this far before it at most.
CUT = 16
SPACE = " \t\r\n"
Record = TypeVar("Record")
LONGEST = 8 << 20
SKIP = 1 << 16


def parsed(
    path: str, file: BinaryIO, longest: int, parse: Callable[[Any], Record]
) -> Iterator[tuple[str, Record | BadRecord]]:
    """(place, what `parse` makes of it) of each record; a Verdict where it cannot be read or parsed."""
    for place, value in records(path, file, longest):
        if isinstance(value, BadRecord):
            yield place, value
            continue
        try:
            yield place, parse(value)
        except ContentError as error:
            yield place, BadRecord(path, place, error.reason, error.detail)


def records(path: str, file: BinaryIO, longest: int = LONGEST) -> Iterator[tuple[str, Any]]:
    """(place, value) of each record: "entry 3" of a list (from 0) or "line 4" (from 1).

    Which of the two the file is tells its first character. In the place of a value that cannot be read stands a
    Verdict: `bad json`, `nested too deeply`, `not UTF-8`, `record too long`. Lines go on after one; a list does
    not, because where its next entry begins is unknown.
    """
    start = file.read(4096)
    file.seek(0)
    if start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        yield from _entries(path, file, longest)
    else:
        yield from _lines(path, file, longest)


def _lines(path: str, file: BinaryIO, longest: int) -> Iterator[tuple[str, Any]]:
    for number, line in lines(file, longest):
        place = f"line {number}"
        if line is None:
            yield place, BadRecord(path, place, "record too long", f"over {longest} bytes")
            continue
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            yield place, json.loads(line.decode())
        except UnicodeDecodeError as error:
            yield place, BadRecord(path, place, "not UTF-8", str(error))
        except ValueError as error:
            yield place, BadRecord(path, place, "bad json", str(error))
        except RecursionError:
            yield place, BadRecord(path, place, "nested too deeply")


def _entries(path: str, file: BinaryIO, longest: int) -> Iterator[tuple[str, Any]]:
    text = _Text(file)
    text.skip(SPACE + "\ufeff")
    text.take()  # the bracket
    decoder = json.JSONDecoder()
    number = 0
    while True:
        place = f"entry {number}"
        mark = text.skip(SPACE)
        if number and mark == ",":
            text.take()
            mark = text.skip(SPACE)
        elif number and mark not in ("]", ""):
            yield place, BadRecord(path, place, "bad json", f"a comma expected, found {mark!r}")
            return
        if mark == "]":
            text.take()
            if text.skip(SPACE):
                yield place, BadRecord(path, place, "bad json", "more stands behind the list's end")
            return
        if not mark:
            yield place, BadRecord(path, place, "bad json", "the file ends inside the list: it is cut off")
            return
        while True:
            try:
                value, end = decoder.raw_decode(text.buffer, text.position)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(text.buffer) - CUT
                room = len(text.buffer) - text.position <= longest
                if cut and room and text.grow():
                    continue
                reason = "bad json" if room else "record too long"
                near = text.buffer[error.pos : error.pos + 40]
                detail = f"{error.msg} near {near!r}" if room else f"over {longest} characters"
                yield place, BadRecord(path, place, reason, detail)
                return
            except RecursionError:
                yield place, BadRecord(path, place, "nested too deeply")
                return
            # A number that the buffer's end cuts reads as a shorter one.
            whole = text.buffer[end - 1] in '}]"' or end + CUT < len(text.buffer)
            length = end - text.position
            if whole or not text.grow():
                break
        text.position += length
        yield place, value
        number += 1


class _Text:
    """Decoded text of a file from `position` on, read as it is asked for."""

    def __init__(self, file: BinaryIO) -> None:
        self.buffer = ""
        self.position = 0
        self._file = file
        # Bytes that are no UTF-8 come as lone surrogates, by which a record's checks know them.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def grow(self) -> bool:
        """Read as much again as is held, so that a long record is tried few times; False at the end."""
        kept = self.buffer[self.position :]
        data = self._file.read(max(CHUNK, len(kept)))
        self.buffer = kept + self._decoder.decode(data, final=not data)
        self.position = 0
        return bool(data)

    def skip(self, letters: str) -> str:
        """The next character that is none of `letters`, not taken; "" at the end."""
        while True:
            while self.position < len(self.buffer) and self.buffer[self.position] in letters:
                self.position += 1
            if self.position < len(self.buffer):
                return self.buffer[self.position]
            if not self.grow():
                return ""

    def take(self) -> None:
        self.position += 1


@contextmanager
def reading(path: str) -> Iterator[BinaryIO]:
    """The file opened, with the readline of a local one: a remote one's cannot be bounded."""
    with storage.store_errors(path), storage.open_bytes(path) as file:
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
