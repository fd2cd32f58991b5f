"""Central directory of a zip archive, read in place: names, sizes and positions of the members; unpacks nothing."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pretrain.weights.byte_file import ByteFile

# Signatures and records of PKWARE's APPNOTE, sections 4.3.7 to 4.3.16.
LOCAL, CENTRAL, END, END_64, LOCATOR_64 = (
    b"PK\x03\x04",
    b"PK\x01\x02",
    b"PK\x05\x06",
    b"PK\x06\x06",
    b"PK\x06\x07",
)
TAIL = 22 + 65535  # the end record with a comment of maximal length
MAX_DIRECTORY = 64 << 20
STORED = 0


@dataclass(frozen=True)
class Entry:
    """A member: stored size in bytes; `header` is the offset of its header, `end` that of the next member."""

    name: str
    method: int
    size: int
    header: int
    end: int


class ZipDirectory:
    """Members of an archive. Raises ValueError if it is damaged, encrypted or has contradictory sizes."""

    def __init__(self, file: ByteFile) -> None:
        self._file = file
        start, length, count = self._locate_directory()
        raw = file.peek(start, start + length)
        found: list[Entry] = []
        at = 0
        for _ in range(count):
            entry, at = _entry(raw, at)
            found.append(entry)
        if at != length:
            raise ValueError("its directory has another length than its end record states")
        self.entries: dict[str, Entry] = {}
        end = start
        for entry in sorted(found, key=lambda entry: entry.header, reverse=True):
            if entry.name in self.entries:
                raise ValueError(f"it contains {entry.name!r} twice")
            if entry.header + 30 + entry.size > end:
                raise ValueError(f"{entry.name!r} overlaps the next member")
            self.entries[entry.name] = Entry(entry.name, entry.method, entry.size, entry.header, end)
            end = entry.header

    def start(self, entry: Entry) -> int:
        """Offset of the first content byte of a stored (uncompressed) member."""
        if entry.method != STORED:
            raise ValueError(f"{entry.name!r} is compressed")
        header = self._file.peek(entry.header, entry.header + 30)
        if header[:4] != LOCAL:
            raise ValueError(f"{entry.name!r} has no header at the offset in the directory")
        name, extra = struct.unpack("<HH", header[26:30])
        start = entry.header + 30 + int(name) + int(extra)
        if start + entry.size > entry.end:
            raise ValueError(f"{entry.name!r} overlaps the next member")
        return start

    def _locate_directory(self) -> tuple[int, int, int]:
        """Offset, length in bytes and number of entries of the directory."""
        size = self._file.size
        tail = self._file.peek(max(0, size - TAIL), size)
        at = tail.rfind(END)
        if at < 0 or at + 22 > len(tail):
            raise ValueError("it is not a zip archive, or its end is missing")
        count, length, start, comment = struct.unpack("<HIIH", tail[at + 10 : at + 22])
        end = size - len(tail) + at
        if end + 22 + comment != size:
            raise ValueError("there are bytes after the archive")
        locator = tail[at - 20 : at] if at >= 20 else b""
        if locator[:4] == LOCATOR_64:
            record_at = struct.unpack("<Q", locator[8:16])[0]
            record = self._file.peek(record_at, record_at + 56) if record_at + 76 <= end else b""
            if record[:4] != END_64:
                raise ValueError("its 64-bit directory is not at the stated offset")
            count, length, start = struct.unpack("<QQQ", record[32:56])
            end = record_at
        if start + length > end or length > MAX_DIRECTORY:
            raise ValueError(f"its directory has {length} bytes at offset {start}, more than allowed")
        return start, length, count


def _entry(raw: bytes, at: int) -> tuple[Entry, int]:
    """Return the directory entry at offset `at`, and the offset of the next one."""
    if raw[at : at + 4] != CENTRAL or at + 46 > len(raw):
        raise ValueError("its directory ends early")
    flags, method = struct.unpack_from("<HH", raw, at + 8)
    packed, size, name, extra, comment = struct.unpack_from("<IIHHH", raw, at + 20)
    header = struct.unpack_from("<I", raw, at + 42)[0]
    body = at + 46
    end = body + name + extra + comment
    if end > len(raw):
        raise ValueError("its directory ends early")
    if flags & 1:
        raise ValueError("it is encrypted")
    size, packed, header = _zip64_values(raw[body + name : body + name + extra], size, packed, header)
    if method == STORED and size != packed:
        raise ValueError("a member has two sizes")
    text = raw[body : body + name].decode("utf-8" if flags & 0x800 else "cp437")
    return Entry(text, method, packed, header, 0), end


def _zip64_values(extra: bytes, *values: int) -> list[int]:
    """Replace values of 0xFFFFFFFF by the 64-bit values in an entry's extra field."""
    at = 0
    field = b""
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + length]
        at += 4 + length
    wide = []
    for value in values:
        if value == 0xFFFFFFFF:
            if len(field) < 8:
                raise ValueError("a member's 64-bit size is missing")
            value, field = struct.unpack("<Q", field[:8])[0], field[8:]
        wide.append(value)
    return wide
