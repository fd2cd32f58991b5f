"""Members of a tar from its headers: ustar, GNU and pax; damaged and cut tars are named with the byte.

Contents are not read.
"""

from __future__ import annotations

import posixpath
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple, Protocol
from zlib import adler32

from data_pipeline.errors import UserError
from data_pipeline.sources.left_out import HARD, SPECIAL, SYMBOLIC, LeftOut
from data_pipeline.storage.file_kind import checksums, describe_kind, file_kind

TAR_BLOCK_BYTES = 512
ZERO_BLOCK = bytes(TAR_BLOCK_BYTES)
# name, size, checksum, kind, magic, prefix of a header (POSIX ustar, IEEE Std 1003.1).
HEADER = struct.Struct("100s24x12s12x8sc100x6s82x155s12x")
ADLER_MODULUS = 65521
MAX_EXTENSION_BYTES = 1 << 20  # of a GNU long name or of pax records, which are read into memory
# Headers about a later one: GNU long name and long link, pax records, those of Solaris, and those of all later members.
EXTENSION_KINDS = b"LKxXg"
LEFT_OUT_KINDS = {b"2": SYMBOLIC, b"3": SPECIAL, b"4": SPECIAL, b"6": SPECIAL}
# Writers pad a tar with zeros to a multiple of their record. Records of up to 20 blocks (the default of GNU tar, bsdtar
# and Python) are accepted at any size of the tar, larger ones (tar -b) only if its size is a multiple of them.
DEFAULT_RECORD_BYTES = 20 * TAR_BLOCK_BYTES
LARGE_RECORDS_BYTES = tuple(blocks * TAR_BLOCK_BYTES for blocks in (32, 64, 126, 128, 256, 512, 1024, 2048))
END_CHUNK_BYTES = 1 << 20  # read at once while the bytes after an end mark are compared with zeros


class SliceableBytes(Protocol):
    """Source of tar headers: bytes, or a BufferedTar."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> bytes: ...


class Member(NamedTuple):
    """A regular file in a tar: `size` bytes of content at byte `offset`.

    `first` is the byte of its first header; a long name has its own header before that of the file. `stop` is the byte
    after its padding, where the next header begins. A hard link has its own headers, and the content of its target.
    """

    first: int
    name: str
    offset: int
    size: int
    stop: int


class BufferedTar:
    """A tar read through one buffer: `near` bytes per read, or `far` bytes after a skip over a larger member.

    About twice as fast as a memory map, whose pages are loaded one after the other.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int, near: int, far: int) -> None:
        """`read(offset, length)` returns `length` bytes, fewer only at the end of the tar."""
        self._read, self._size = read, size
        self._near, self._far = near, far
        self._start = self._stop = 0
        self._data = b""

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice, /) -> bytes:
        start, stop = part.start, min(part.stop, self._size)
        if start < self._start or stop > self._stop:
            is_near = start < self._stop + self._near
            length = max(self._near if is_near else self._far, stop - start)
            self._start, self._data = start, self._read(start, min(length, self._size - start))
            self._stop = start + len(self._data)
        return self._data[start - self._start : stop - self._start]


class TruncatedTarError(UserError):
    """A tar ends before its end-of-archive mark, or goes on after it; `place` names the point in messages."""

    place = "the cut"


class LinkOutsideError(UserError):
    """A span of a tar has a hard link to a file outside of it."""


class StrayBytesError(TruncatedTarError):
    """More than padding follows the end-of-archive mark of a tar, so members may be lost."""

    place = "that mark"


def iter_members(
    data: SliceableBytes, where: str, is_span: bool = False, left_out: LeftOut | None = None
) -> Iterator[Member]:
    """Iterate over the files of a tar, in order; reads ustar, GNU long names and pax headers, and follows hard links.

    With `is_span`, `data` is a part of a tar that ends before another header, so it needs no end-of-archive mark.
    `left_out` counts the links that lead out of the tar, and special files.
    Raises UserError with the byte position if a header is damaged, TruncatedTarError if the tar is cut off,
    StrayBytesError if more than padding follows its end-of-archive mark, LinkOutsideError for a link out of a span.
    """
    end, first, position = len(data), 0, 0
    long_name: str | None = None
    long_link: str | None = None
    pax: dict[str, str] = {}
    extended = False  # True after headers that extend the next one
    links: _HardLinks | None = None
    while True:
        header = data[position : position + TAR_BLOCK_BYTES]
        if len(header) < TAR_BLOCK_BYTES:
            if is_span and position == end and not extended:
                return
            raise _ends_early(header, position, end, where)
        raw_name, raw_size, checksum, kind, magic, prefix = HEADER.unpack(header)
        try:
            # The lower half of Adler-32 is one more than the sum of the bytes, modulo 65521, and far faster.
            fault = (adler32(header) % 65536 - sum(checksum) + 255 - int(checksum[:6], 8)) % ADLER_MODULUS
            size = int(raw_size[:11], 8) if raw_size[:11].isdigit() and raw_size[11] in b"\0 " else -1
        except ValueError:
            fault, size = 1, -1
        if fault:
            if header == ZERO_BLOCK:
                _check_end(data, position, where, is_span or extended)
                return
            _check_header(header, position, where)
        if size < 0:
            size = _number(raw_size, position, where)
        if "size" in pax and kind not in EXTENSION_KINDS:
            size = int(pax["size"])
        content = position + TAR_BLOCK_BYTES
        if kind in b"123456":
            size = 0
        if content + size > end:
            expected = f"the member at byte {position} should end at byte {content + size}"
            raise _truncated(where, f"{expected}, but the file ends at byte {end}")
        position = content + -(-size // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
        if kind in EXTENSION_KINDS:
            long_name, long_link, pax = _extend(kind, data, content, size, where, (long_name, long_link, pax))
            extended = extended or kind != b"g"
            first = first if extended else position
            continue
        name = pax.get("path") or long_name or _name(raw_name, magic, prefix)
        if kind in b"07\0":
            # Old tars mark a folder only by its trailing slash.
            if name[-1:] != "/":
                yield Member(first, name, content, size, position)
                if links is not None:
                    links.add(name, content, size)
        elif kind == b"1":
            links = links or _HardLinks(data, first, where)
            target = links.find(pax.get("linkpath") or long_link or _text(header[157:257]))
            if target is not None:
                yield Member(first, name, *target, position)
            elif is_span:
                raise LinkOutsideError(f"{where}: {name} is a hard link to a file outside of it")
            elif left_out is not None:
                left_out.add(HARD, name)
        elif kind == b"S":
            raise _sparse(where)
        elif left_out is not None and kind in LEFT_OUT_KINDS:
            left_out.add(LEFT_OUT_KINDS[kind], name)
        if extended:
            long_name, long_link, pax, extended = None, None, {}, False
        first = position


def _ends_early(header: bytes, position: int, end: int, where: str) -> UserError:
    """The error for data that ends where a header should begin. Raises UserError for a file that is no tar."""
    if not position:
        _check_kind(header, where)
    return _truncated(where, f"{end} bytes and no end-of-archive mark, so its writer was interrupted")


class _HardLinks:
    """Finds the targets of hard links: the last file of that name before the link. Built at the first link of a tar."""

    def __init__(self, data: SliceableBytes, stop: int, where: str) -> None:
        """Walks again over the headers before byte `stop`, which have no hard link."""
        self._places: dict[str, tuple[int, int]] = {}
        for member in iter_members(_Before(data, stop), where, is_span=True):
            self.add(member.name, member.offset, member.size)

    def add(self, name: str, offset: int, size: int) -> None:
        self._places[posixpath.normpath(name)] = offset, size

    def find(self, name: str) -> tuple[int, int] | None:
        """(offset, size) of a file's content."""
        return self._places.get(posixpath.normpath(name))


class _Before:
    """The bytes of a tar before `stop`."""

    def __init__(self, data: SliceableBytes, stop: int) -> None:
        self._data, self._stop = data, stop

    def __len__(self) -> int:
        return self._stop

    def __getitem__(self, part: slice, /) -> bytes:
        return self._data[part.start : min(part.stop, self._stop)]


def _extend(
    kind: bytes,
    data: SliceableBytes,
    content: int,
    size: int,
    where: str,
    known: tuple[str | None, str | None, dict[str, str]],
) -> tuple[str | None, str | None, dict[str, str]]:
    """(long name, long link, pax records) of the next member, from the `known` ones and one more header about it."""
    long_name, long_link, pax = known
    _check_extension_size(size, content, where)
    if kind == b"L":
        long_name = _text(data[content : content + size])
    elif kind == b"K":
        long_link = _text(data[content : content + size])
    elif kind in b"xX":  # of two, the first decides, as in tarfile
        pax = _pax_records(data[content : content + size], where) | pax
    elif kind == b"g":
        _check_global(_pax_records(data[content : content + size], where), where)
    return long_name, long_link, pax


def _check_end(data: SliceableBytes, mark: int, where: str, is_unexpected: bool) -> None:
    """Raise StrayBytesError if more than a writer's padding follows the end-of-archive mark at byte `mark`.

    is_unexpected: the mark is where a member has to begin
    """
    if is_unexpected:
        raise StrayBytesError(
            f"{where} is damaged: zeros at byte {mark}, where a member should begin; fetch or make it again"
        )
    size, position = len(data), mark + TAR_BLOCK_BYTES
    while position < size:
        chunk = data[position : min(position + END_CHUNK_BYTES, size)]
        if len(chunk.lstrip(b"\0")):
            _raise_stray(data, mark, position + len(chunk) - len(chunk.lstrip(b"\0")), where)
        if not chunk:  # the file became shorter meanwhile
            return
        position += len(chunk)
    zeros = size - mark
    larger = [record for record in LARGE_RECORDS_BYTES if mark and size % record == 0]
    if (
        zeros > max([DEFAULT_RECORD_BYTES, *larger]) + TAR_BLOCK_BYTES
    ):  # the mark has two blocks, and the first may end a record
        raise StrayBytesError(
            f"{where}: its last {zeros} bytes, from byte {mark} on, are zeros, more than a writer's padding: probably "
            "a download that reserved its size and was not finished; fetch it again, or, if it is whole, cut it with: "
            f"truncate -s {mark + 2 * TAR_BLOCK_BYTES}"
        )


def _raise_stray(data: SliceableBytes, mark: int, position: int, where: str) -> None:
    """Raise StrayBytesError for the byte at `position`, which is not zero and follows the mark."""
    block = position // TAR_BLOCK_BYTES * TAR_BLOCK_BYTES
    header = data[block : block + TAR_BLOCK_BYTES]
    found = f"other bytes begin at byte {position}"
    with suppress(UserError):
        if len(header) == TAR_BLOCK_BYTES:
            _check_header(header, block, where)
            found = f"other members begin at byte {block}"
    raise StrayBytesError(
        f"{where}: {found}, after the end-of-archive mark at byte {mark}, behind which nothing is read: a download "
        "with a gap, or tars joined by cat; fetch it again, or unpack it with tar --ignore-zeros -xf and write it anew"
    )


def _truncated(where: str, reason: str) -> TruncatedTarError:
    return TruncatedTarError(f"{where} is cut off: {reason}; make it again or remove it")


def _sparse(where: str) -> UserError:
    return UserError(f"{where}: sparse members are not supported; write the tar without --sparse")


def _check_extension_size(size: int, content: int, where: str) -> None:
    if size > MAX_EXTENSION_BYTES:
        raise UserError(
            f"{where} is damaged: the header at byte {content - TAR_BLOCK_BYTES} says that a name takes "
            f"{size} bytes; make it again or remove it"
        )


def _check_global(records: Mapping[str, str], where: str) -> None:
    """Raise UserError for a global name or size: they would hold for every member that follows."""
    wrong = next((key for key in ("path", "size") if key in records), None)
    if wrong is not None:
        raise UserError(
            f"{where}: a global pax header sets {wrong} for all members; write the tar without it"
        )


def _check_header(header: bytes, position: int, where: str) -> None:
    """Raise UserError for a header with a wrong checksum; the exact check behind the fast one of iter_members.

    As GNU tar and Python do, it takes a sum of signed bytes too: old writers used it for names that are not ASCII.
    """
    if position == 0:
        _check_kind(header, where)
    if _number(header[148:156], position, where) not in checksums(header):
        raise UserError(
            f"{where} is not a tar, or is damaged: wrong checksum in the header at byte {position}; fetch or make it "
            "again"
        )


def _check_kind(head: bytes, where: str) -> None:
    """Raise UserError if the first bytes are those of a file of another kind."""
    other = describe_kind(file_kind(head), where)
    if other is not None:
        raise UserError(other)


def _number(field: bytes, position: int, where: str) -> int:
    """Decode a number field: octal digits, or GNU's base-256 for sizes over 8 GiB."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if digits and not re.fullmatch(rb"[0-7]+", digits):
        if position == 0:
            raise UserError(
                f"{where} is not a tar: its first 512 bytes are not a tar header; correct the path, or fetch it again"
            )
        raise UserError(
            f"{where} is damaged: no header at byte {position}, where the next member should start; fetch or make it "
            "again"
        )
    return int(digits or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _name(name: bytes, magic: bytes, prefix: bytes) -> str:
    # Only POSIX ustar has the prefix field; old GNU headers ("ustar  ") use these bytes otherwise.
    if prefix[0] and magic == b"ustar\0":
        return f"{_text(prefix)}/{_text(name)}"
    return _text(name)


def _pax_records(data: bytes, where: str) -> dict[str, str]:
    """Decode `LENGTH key=value\\n` records; LENGTH counts the whole record. Raises UserError if they are invalid."""
    records: dict[str, str] = {}
    position = 0
    try:
        while position < len(data) and data[position]:  # some writers pad the records with NULs
            space = data.index(b" ", position)
            length = int(data[position:space])
            key, separator, value = data[space + 1 : position + length - 1].partition(b"=")
            if not separator or length <= 0:
                raise ValueError("a record has no =")
            records[key.decode()] = value.decode("utf-8", "surrogateescape")
            position += length
        if int(records.get("size", "0")) < 0:
            raise ValueError("negative size")
    except ValueError as error:
        raise UserError(f"{where} is damaged: a pax header cannot be read ({error})") from None
    if any(key.startswith("GNU.sparse.") for key in records):
        raise _sparse(where)
    return records
