"""Lines, JSONL and JSON lists record by record, in memory that does not grow with the file.

Files are UTF-8, or UTF-16 with its byte order mark; marks are removed, also those inside joined files.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO, TypeVar, cast

from data_pipeline import storage
from data_pipeline.errors import ContentError
from data_pipeline.formats.records import BadRecord
from data_pipeline.text_encoding import decode_line, is_utf16, without_bom

MAX_RECORD_BYTES = 8 << 20  # default limit of a line, and in characters of an entry of a list
CHUNK_BYTES = 1 << 18
SKIP_BYTES = 1 << 16  # read at a time of a line beyond the limit
# If the end of the buffer cuts a literal, number or escape, json's error position is at most this many characters
# before the end.
CUT_CHARACTERS = 16
WHITESPACE = " \t\r\n"
Record = TypeVar("Record")


def parse_records(
    path: str, file: BinaryIO, max_bytes: int, parse: Callable[[Any], Record]
) -> Iterator[tuple[str, Record | BadRecord]]:
    """Yield (place, parsed record) per record; a BadRecord if it cannot be read or `parse` raises ContentError."""
    for place, value in records(path, file, max_bytes):
        if isinstance(value, BadRecord):
            yield place, value
            continue
        try:
            yield place, parse(value)
        except ContentError as error:
            yield place, BadRecord(path, place, error.reason, error.detail)


def records(path: str, file: BinaryIO, max_bytes: int = MAX_RECORD_BYTES) -> Iterator[tuple[str, Any]]:
    """Yield (place, JSON value) per record: "entry 3" (from 0) of a list, or "line 4" (from 1) of lines.

    A list begins with "[", lines do not. An unreadable value is a BadRecord: `bad json`, `nested too deeply`,
    `not UTF-8`, `NUL in text`, `record too long`. Reading continues after a bad line; a bad entry ends a list, because
    the start of the next entry is unknown.
    """
    start = file.read(4096)
    file.seek(0)
    if without_bom(start).lstrip()[:1] == b"[":
        yield from _entries(path, file, max_bytes)
    else:
        yield from _lines(path, file, max_bytes)


def _lines(path: str, file: BinaryIO, max_bytes: int) -> Iterator[tuple[str, Any]]:
    for number, line in lines(file, max_bytes):
        place = f"line {number}"
        if line is None:
            yield place, BadRecord(path, place, "record too long", f"over {max_bytes} bytes")
            continue
        try:
            text = decode_line(line)
            if text.strip():
                yield place, json.loads(text)
        except ContentError as error:
            yield place, BadRecord(path, place, error.reason, error.detail)
        except ValueError as error:
            yield place, BadRecord(path, place, "bad json", str(error))
        except RecursionError:
            yield place, BadRecord(path, place, "nested too deeply")


def _entries(path: str, file: BinaryIO, max_bytes: int) -> Iterator[tuple[str, Any]]:
    text = _Text(file)
    text.skip(WHITESPACE + "\ufeff")
    text.take()  # the bracket
    decoder = json.JSONDecoder()
    number = 0
    while True:
        place = f"entry {number}"
        mark = text.skip(WHITESPACE)
        if number and mark == ",":
            text.take()
            mark = text.skip(WHITESPACE)
        elif number and mark not in ("]", ""):
            yield place, BadRecord(path, place, "bad json", f"expected a comma, found {mark!r}")
            return
        if mark == "]":
            text.take()
            if text.skip(WHITESPACE):
                yield (
                    place,
                    BadRecord(path, place, "bad json", "there is more text after the end of the list"),
                )
            return
        if not mark:
            yield place, BadRecord(path, place, "bad json", "the file is cut off: it ends inside the list")
            return
        while True:
            try:
                value, end = decoder.raw_decode(text.buffer, text.position)
            except json.JSONDecodeError as error:
                # json has no field that tells an entry cut off by the end of the buffer from invalid JSON.
                cut = (
                    error.msg.startswith("Unterminated string")
                    or error.pos >= len(text.buffer) - CUT_CHARACTERS
                )
                room = len(text.buffer) - text.position <= max_bytes
                if cut and room and text.grow():
                    continue
                reason = "bad json" if room else "record too long"
                near = text.buffer[error.pos : error.pos + 40]
                detail = f"{error.msg} near {near!r}" if room else f"over {max_bytes} characters"
                yield place, BadRecord(path, place, reason, detail)
                return
            except RecursionError:
                yield place, BadRecord(path, place, "nested too deeply")
                return
            # A number that is cut off by the end of the buffer is read as a shorter number.
            whole = text.buffer[end - 1] in '}]"' or end + CUT_CHARACTERS < len(text.buffer)
            length = end - text.position
            if whole or not text.grow():
                break
        text.position += length
        yield place, value
        number += 1


class _Text:
    """Decoded text of a file, read in chunks; `position` is the next character in `buffer`."""

    def __init__(self, file: BinaryIO) -> None:
        self.buffer = ""
        self.position = 0
        self._file = file
        # Bytes that are not UTF-8 become lone surrogates, which the checks of a record detect.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def grow(self) -> bool:
        """Read at least as much as is buffered, so that a long record is parsed few times; False at the end."""
        kept = self.buffer[self.position :]
        data = self._file.read(max(CHUNK_BYTES, len(kept)))
        self.buffer = kept + self._decoder.decode(data, final=not data)
        self.position = 0
        return bool(data)

    def skip(self, letters: str) -> str:
        """Skip `letters`; returns the next character without taking it, "" at the end."""
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
def open_text(path: str) -> Iterator[BinaryIO]:
    """Open a file for `lines`; UTF-16 is read as UTF-8.

    A remote file is buffered, because its own readline ignores the size limit.
    """
    with ExitStack() as stack:
        stack.enter_context(storage.store_errors(path))
        file = stack.enter_context(storage.open_bytes(path))
        if not isinstance(file, io.BufferedReader):
            file = stack.enter_context(io.BufferedReader(cast(io.RawIOBase, file), 1 << 20))
        if is_utf16(file.peek(4)[:4]):
            file = stack.enter_context(io.BufferedReader(_Utf16AsUtf8(file), CHUNK_BYTES))
        yield file


def bytes_read(file: BinaryIO) -> int:
    """Bytes of the file on disk that have been read from a file of `open_text`."""
    raw = getattr(file, "raw", None)
    return raw.consumed if isinstance(raw, _Utf16AsUtf8) else file.tell()


class _Utf16AsUtf8(io.RawIOBase):
    """A UTF-16 file as UTF-8 bytes. What is no UTF-16 becomes bytes that are no UTF-8, so its line is refused."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._restart()

    def _restart(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-16")("surrogatepass")
        self._ready = b""
        self._position = 0

    @property
    def consumed(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if (offset, whence) != (0, io.SEEK_SET):
            raise io.UnsupportedOperation("a UTF-16 file can only be read from its start")
        self._file.seek(0)
        self._restart()
        return 0

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._file.read(CHUNK_BYTES)
            try:
                text = self._decoder.decode(data, final=not data)
            except UnicodeDecodeError:  # half a character at the end
                self._ready = b"\xff"
                self._decoder.reset()
                break
            self._ready = text.encode("utf-8", "surrogatepass")
            if not data:
                break
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        self._position += count
        return count


def lines(file: BinaryIO, max_bytes: int = MAX_RECORD_BYTES) -> Iterator[tuple[int, bytes | None]]:
    """Yield (number from 1, line without its end); None for a line of more than `max_bytes` bytes."""
    number = 0
    while line := file.readline(max_bytes + 2):
        number += 1
        line, ended = line.rstrip(b"\r\n"), line.endswith(b"\n")
        if len(line) <= max_bytes:
            yield number, line
            continue
        while not ended:
            line = file.readline(SKIP_BYTES)
            ended = line.endswith(b"\n") or not line
        yield number, None
