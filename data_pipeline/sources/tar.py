"""Webdataset tars: deterministic writer, header walk, sample and member naming.

Members are found from the headers alone; contents are not read.
"""

from __future__ import annotations

import io
import os
import re
import struct
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple, Protocol
from zlib import adler32

from data_pipeline import storage
from data_pipeline.errors import UserError

TAR_BLOCK_BYTES = 512
ZERO_BLOCK = bytes(TAR_BLOCK_BYTES)
# The image of a sample is its member with the first of these extensions.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
# webdataset skips members such as __index__/x.json: they describe the tar and belong to no sample.
META_MEMBER = re.compile(r"__[^/]*__($|/)")
# name, size, checksum, kind, magic, prefix of a header (POSIX ustar, IEEE Std 1003.1).
HEADER = struct.Struct("100s24x12s12x8sc100x6s82x155s12x")
ADLER_MODULUS = 65521
MAX_EXTENSION_BYTES = 1 << 20  # of a GNU long name or of pax records, which are read into memory
# Headers about a later one: GNU long name and long link, pax records, those of Solaris, and those of all later members.
EXTENSION_KINDS = b"LKxXg"


class SliceableBytes(Protocol):
    """Source of tar headers: bytes, or a BufferedTar."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> bytes: ...


class Member(NamedTuple):
    """A regular file in a tar: `size` bytes of content at byte `offset`.

    `first` is the byte of its first header; a long name has its own header before that of the file.
    """

    first: int
    name: str
    offset: int
    size: int


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
    """A tar ends before its end-of-archive mark."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample of a tar. `members` maps the extension (lower case) to (offset, size) of the content in bytes."""

    key: str
    members: dict[str, tuple[int, int]]


class TarWriter:
    """Writes samples to a tar whose bytes depend only on them: no times, no owners, members sorted.

    The tar appears under `path` when it is closed, and not at all if the `with` block raises.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.samples = 0
        self._stack = ExitStack()
        self._file: BinaryIO = self._stack.enter_context(storage.publishing(self.path))
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._last_key: str | None = None

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a sample. Raises UserError for an invalid or repeated key and for a sample without members.

        `key` may contain folders, but no dot in its last part, because a dot starts the extension.
        """
        if not key or "." in key.rpartition("/")[2] or key.endswith("/") or META_MEMBER.match(key):
            raise UserError(
                f"{self.path}: {key!r} is not a valid sample key (it is empty, has a dot, or is __meta__)"
            )
        if key == self._last_key:
            raise UserError(f"{self.path}: two consecutive samples have the key {key!r}")
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
        """Drop what was written; no file appears under the path."""
        discarded = RuntimeError("discarded")
        try:
            self._stack.__exit__(RuntimeError, discarded, None)
        except RuntimeError as error:
            if error is not discarded:
                raise

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into key and extension: `dir/000.seg.png` -> ("dir/000", "seg.png").

    By webdataset's rule, the extension starts at the first dot of the basename. None for a file that belongs to no
    sample: no extension, a hidden file (macOS adds `._x`), a __meta__ member.
    """
    if name[:2] == "__" and META_MEMBER.match(name):
        return None
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    if dot <= base:
        return None
    return name[:dot], name[dot + 1 :].lower()


def member_table(source: str | os.PathLike[str] | bytes, name: str | None = None) -> list[Sample]:
    """Samples of a tar, in its order, from the headers alone.

    source: path, s3:// URL or content of the tar; name: its name in error messages.
    A sample's members must be adjacent, as webdataset requires. Raises UserError for a damaged or truncated tar.
    """
    if isinstance(source, bytes):
        return group_members(iter_members(source, name or "the tar"), name or "the tar")
    path = os.fspath(source)
    name = name or path
    with open_tar(path) as data:
        return group_members(iter_members(data, name), name)


@contextmanager
def open_tar(url: str, size: int | None = None) -> Iterator[SliceableBytes]:
    """Open a tar for `iter_members`; `size` is its size in bytes if known. Raises UserError for an empty file."""
    if storage.is_remote(url):
        size = storage.size(url) if size is None else size
        _refuse_empty(url, size)
        yield BufferedTar(
            lambda offset, length: storage.read_range(url, offset, length, size), size, 8 << 20, 64 << 10
        )
        return
    with storage.open_bytes(url) as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        _refuse_empty(url, size)
        yield BufferedTar(
            lambda offset, length: storage.read_descriptor(descriptor, offset, length),
            size,
            1 << 20,
            16 << 10,
        )


def _refuse_empty(url: str, size: int) -> None:
    if not size:
        raise UserError(f"{url} is empty (0 bytes); make it again or remove it")


def group_members(members: Iterator[Member], where: str) -> list[Sample]:
    """Group adjacent members into samples. Raises UserError if a sample has two members of one extension."""
    table: list[Sample] = []
    for _, member, offset, length in members:
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


def parse_sample(span: bytes, where: str) -> Sample:
    """The one sample in a span of a tar, from its first header to the next sample's; offsets count from the span.

    Raises UserError, naming `where`, if the span is not exactly one sample.
    """
    table = group_members(iter_members(span, where, is_span=True), where)
    if len(table) != 1:
        keys = ", ".join(repr(sample.key) for sample in table[:3]) or "none"
        raise UserError(f"{where}: expected one sample, found {len(table)} ({keys})")
    return table[0]


def iter_members(data: SliceableBytes, where: str, is_span: bool = False) -> Iterator[Member]:
    """Iterate over the regular files of a tar, in order; reads ustar, GNU long names and pax headers.

    With `is_span`, `data` is a part of a tar that ends before another header, so it needs no end-of-archive mark.
    Raises UserError with the byte position if a header is damaged, TruncatedTarError if the tar is cut off.
    """
    end, first, position = len(data), 0, 0
    long_name: str | None = None
    pax: dict[str, str] = {}
    extended = False  # True after headers that extend the next one
    while True:
        header = data[position : position + TAR_BLOCK_BYTES]
        if len(header) < TAR_BLOCK_BYTES:
            if is_span and position == end and not extended:
                return
            raise _truncated(where, f"{end} bytes and no end-of-archive mark, so its writer was interrupted")
        raw_name, raw_size, checksum, kind, magic, prefix = HEADER.unpack(header)
        try:
            # The lower half of Adler-32 is one more than the sum of the bytes, modulo 65521, and far faster.
            fault = (adler32(header) % 65536 - sum(checksum) + 255 - int(checksum[:6], 8)) % ADLER_MODULUS
            size = int(raw_size[:11], 8) if raw_size[:11].isdigit() and raw_size[11] in b"\0 " else -1
        except ValueError:
            fault, size = 1, -1
        if fault:
            if header == ZERO_BLOCK:
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
        if kind in b"07\0":
            name = pax.get("path") or long_name or _name(raw_name, magic, prefix)
            if extended:
                long_name, pax, extended = None, {}, False
            # Old tars mark a folder only by its trailing slash.
            if name[-1:] != "/":
                yield Member(first, name, content, size)
            first = position
        elif kind in EXTENSION_KINDS:
            _check_extension_size(size, content, where)
            if kind == b"L":
                long_name = _text(data[content : content + size])
            elif kind in b"xX":  # of two, the first decides, as in tarfile
                pax = _pax_records(data[content : content + size], where) | pax
            elif kind == b"g":
                _check_global(_pax_records(data[content : content + size], where), where)
            extended = extended or kind != b"g"
            first = first if extended else position
        elif kind == b"S":
            raise _sparse(where)
        else:
            long_name, pax, extended, first = None, {}, False, position


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
    """Raise UserError for a header with a wrong checksum; the exact check behind the fast one of iter_members."""
    if position == 0 and header[:2] == b"\x1f\x8b":
        raise UserError(f"{where} is compressed with gzip; unpack it, because ranges of it cannot be read")
    stated = _number(header[148:156], position, where)
    if stated != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise UserError(
            f"{where} is not a tar, or is damaged: wrong checksum in the header at byte {position}"
        )


def _number(field: bytes, position: int, where: str) -> int:
    """Decode a number field: octal digits, or GNU's base-256 for sizes over 8 GiB."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if digits and not re.fullmatch(rb"[0-7]+", digits):
        if position == 0:
            raise UserError(f"{where} is not a tar: its first 512 bytes are not a tar header")
        raise UserError(
            f"{where} is damaged: no header at byte {position}, where the next member should start"
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
        while position < len(data):
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


def image_member(members: Iterable[str]) -> str | None:
    """Extension of a sample's image; None if it has no image."""
    present = set(members)
    return next((extension for extension in IMAGE_EXTENSIONS if extension in present), None)
