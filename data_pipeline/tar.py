"""Tar shards: written to the same bytes every time, read by their headers alone into a table of members."""

from __future__ import annotations

import io
import mmap
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import BinaryIO

from data_pipeline import storage
from data_pipeline.errors import UserError

BLOCK = 512
ZERO = bytes(BLOCK)
REGULAR = (b"0", b"\0", b"7")
# webdataset skips members such as __index__/x.json: they describe the tar and are no samples.
META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample's place in its tar: extension (lower case) -> (offset of the content, bytes)."""

    key: str
    members: dict[str, tuple[int, int]]


class TarWriter:
    """Writes samples to a tar that depends on nothing but them: no times, no owners, members sorted.

    The tar appears under `path` when it is closed, and not at all if the block ends in an exception.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.samples = 0
        self._stack = ExitStack()
        self._file: BinaryIO = self._stack.enter_context(storage.publishing(self.path))
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._last_key: str | None = None

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a sample. `key` may hold folders; a dot in its last part would start the extension."""
        if not key or "." in key.rpartition("/")[2] or key.endswith("/") or META.match(key):
            raise UserError(f"{self.path}: {key!r} cannot be the key of a sample (empty, a dot, or __meta__)")
        if key == self._last_key:
            raise UserError(f"{self.path}: two samples in a row have the key {key!r}")
        if not members:
            raise UserError(f"{self.path}: sample {key!r} has no members")
        self._last_key = key
        for extension in sorted(members):
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(members[extension])
            info.mode = 0o644
            self._tar.addfile(info, io.BytesIO(members[extension]))
        self.samples += 1

    def close(self) -> None:
        self._tar.close()
        self._stack.close()

    def discard(self) -> None:
        """Give up: nothing appears under the path."""
        abandoned = RuntimeError("abandoned")
        try:
            self._stack.__exit__(RuntimeError, abandoned, None)
        except RuntimeError as error:
            if error is not abandoned:
                raise

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def split_name(name: str) -> tuple[str, str] | None:
    """`dir/000.seg.png` -> ("dir/000", "seg.png"): by webdataset's rule, up to the basename's first dot.

    None for what is no member of a sample: no extension, a hidden file (macOS adds `._x`), __meta__ members.
    """
    if META.match(name):
        return None
    folder, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or not stem:
        return None
    return (f"{folder}/{stem}" if folder or name.startswith("/") else stem), extension.lower()


def member_table(source: str | os.PathLike[str] | bytes, name: str | None = None) -> list[Sample]:
    """The samples of a tar in its order, found by walking the headers; contents are not read.

    Parameters: `source` is a path, an s3:// url (fetched whole) or the tar's bytes; `name` is for messages.
    Members of one sample are adjacent, as webdataset requires. Raises UserError for what is no whole tar.
    """
    if isinstance(source, bytes):
        return group_members(walk(source, name or "the tar"), name or "the tar")
    path = os.fspath(source)
    name = name or path
    if storage.is_remote(path):
        return group_members(walk(storage.read_bytes(path), name), name)
    with storage.open_bytes(path) as file:
        if not os.fstat(file.fileno()).st_size:
            raise UserError(f"{name} is empty (0 bytes); make it again or remove it")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return group_members(walk(mapped, name), name)


def group_members(members: Iterator[tuple[str, int, int]], where: str) -> list[Sample]:
    """(name, offset, size) in the tar's order -> samples."""
    table: list[Sample] = []
    for member, offset, length in members:
        parts = split_name(member)
        if parts is None:
            continue
        key, extension = parts
        if not table or table[-1].key != key:
            table.append(Sample(key, {}))
        if extension in table[-1].members:
            raise UserError(f"{where}: sample {key!r} has two members .{extension}; make the shard again")
        table[-1].members[extension] = (offset, length)
    return table


def walk(data: bytes | mmap.mmap, where: str) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of every regular file, in order: ustar, GNU long names, pax headers."""
    end = len(data)
    position = 0
    long_name: str | None = None
    pax: dict[str, str] = {}
    while True:
        header = data[position : position + BLOCK]
        if len(header) < BLOCK:
            raise UserError(
                f"{where} is cut off: {end} bytes and no end-of-archive mark, so its writer was interrupted; "
                "make it again or remove it"
            )
        if header == ZERO:
            return
        _check_header(header, position, where)
        kind = header[156:157]
        length = _number(header[124:136], position, where)
        if "size" in pax and kind not in (b"x", b"g"):
            length = int(pax["size"])
        content = position + BLOCK
        if kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
            length = 0
        if content + length > end:
            raise UserError(
                f"{where} is cut off: the member at byte {position} should end at byte {content + length}, "
                f"the file at byte {end}; make it again or remove it"
            )
        position = content + -(-length // BLOCK) * BLOCK
        if kind == b"L":
            long_name = _text(data[content : content + length])
        elif kind == b"x":
            pax = _pax_records(data[content : content + length], where)
            if any(key.startswith("GNU.sparse.") for key in pax):
                raise UserError(f"{where}: sparse members are not supported; write the tar without --sparse")
        elif kind == b"S":
            raise UserError(f"{where}: sparse members are not supported; write the tar without --sparse")
        elif kind not in (b"g", b"K"):
            name = pax.get("path") or long_name or _name(header)
            long_name, pax = None, {}
            # Old tars mark a folder by its trailing slash alone.
            if kind in REGULAR and not name.endswith("/"):
                yield name, content, length


def _check_header(header: bytes, position: int, where: str) -> None:
    if position == 0 and header[:2] == b"\x1f\x8b":
        raise UserError(f"{where} is compressed with gzip; unpack it, ranges of it cannot be read")
    stated = _number(header[148:156], position, where)
    if stated != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise UserError(f"{where} is no tar, or damaged: wrong checksum of the header at byte {position}")


def _number(field: bytes, position: int, where: str) -> int:
    """Octal digits, or GNU's base-256 for files over 8 GiB."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if digits and not re.fullmatch(rb"[0-7]+", digits):
        if position == 0:
            raise UserError(f"{where} is no tar: its first 512 bytes are no tar header")
        raise UserError(
            f"{where} is damaged: no header at byte {position}, where the next member should start"
        )
    return int(digits or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name = _text(header[:100])
    # The prefix field belongs to POSIX ustar; old GNU headers ("ustar  ") keep other things there.
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _pax_records(data: bytes, where: str) -> dict[str, str]:
    """`LENGTH key=value\\n` records; LENGTH counts the whole record."""
    records: dict[str, str] = {}
    position = 0
    try:
        while position < len(data):
            space = data.index(b" ", position)
            length = int(data[position:space])
            key, separator, value = data[space + 1 : position + length - 1].partition(b"=")
            if not separator or length <= 0:
                raise ValueError("a record without =")
            records[key.decode()] = value.decode("utf-8", "surrogateescape")
            position += length
        if int(records.get("size", "0")) < 0:
            raise ValueError("a negative size")
    except ValueError as error:
        raise UserError(f"{where} is damaged: a pax header cannot be read ({error})") from None
    return records
