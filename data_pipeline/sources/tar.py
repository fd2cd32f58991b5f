"""Tar shards: written to the same bytes every time, read by their headers alone into a table of members."""

from __future__ import annotations

import io
import os
import re
import struct
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol
from zlib import adler32

from data_pipeline import storage
from data_pipeline.errors import UserError

if TYPE_CHECKING:
    pass


TAR_BLOCK_BYTES = 512
ZERO = bytes(TAR_BLOCK_BYTES)
# webdataset skips members such as __index__/x.json: they describe the tar and are no samples.
META = re.compile(r"__[^/]*__($|/)")
# name, size, checksum, kind, magic, prefix of a header (POSIX ustar, IEEE Std 1003.1).
FIELDS = struct.Struct("100s24x12s12x8sc100x6s82x155s12x")
MODULUS = 65521  # Adler-32's
LONGEST_HEADER = 1 << 20  # bytes of a long name or of pax records, which are read into memory


class Bytes(Protocol):
    """What headers are read from: bytes, or a file of which pieces are read."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> bytes: ...


class Member(NamedTuple):
    """A regular file in a tar. `first` is the byte of its first header: long names have headers before its own."""

    first: int
    name: str
    offset: int
    size: int


class Pieces:
    """A tar of which stretches are read as headers are asked for: `piece` bytes, or `small` past a larger member.

    Reading so is about twice as fast as walking over a memory map, for which pages are fetched one after the other.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int, piece: int, small: int) -> None:
        """`read(offset, length)` gives as many bytes, or fewer at the end."""
        self._read, self._size = read, size
        self._lengths = piece, small
        self._start = self._stop = 0
        self._data = b""

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice, /) -> bytes:
        start, stop = part.start, min(part.stop, self._size)
        if start < self._start or stop > self._stop:
            near = start < self._stop + self._lengths[0]
            length = max(self._lengths[0 if near else 1], stop - start)
            self._start, self._data = start, self._read(start, min(length, self._size - start))
            self._stop = start + len(self._data)
        return self._data[start - self._start : stop - self._start]


class Truncated(UserError):
    """The tar ends before its end-of-archive mark."""


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
    if name[:2] == "__" and META.match(name):
        return None
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    if dot <= base:
        return None
    return name[:dot], name[dot + 1 :].lower()


def member_table(source: str | os.PathLike[str] | bytes, name: str | None = None) -> list[Sample]:
    """The samples of a tar in its order, found by walking the headers; contents are not read.

    Parameters: `source` is a path, an s3:// url or the tar's bytes; `name` is for messages.
    Members of one sample are adjacent, as webdataset requires. Raises UserError for what is no whole tar.
    """
    if isinstance(source, bytes):
        return group_members(walk(source, name or "the tar"), name or "the tar")
    path = os.fspath(source)
    name = name or path
    with open_tar(path) as data:
        return group_members(walk(data, name), name)


@contextmanager
def open_tar(url: str, size: int | None = None) -> Iterator[Bytes]:
    """A tar to walk over; `size` is its bytes where they are known. Raises UserError for an empty file."""
    if storage.is_remote(url):
        size = storage.size(url) if size is None else size
        _refuse_empty(url, size)
        yield Pieces(lambda at, length: storage.read_range(url, at, length, size), size, 8 << 20, 64 << 10)
        return
    with storage.open_bytes(url) as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        _refuse_empty(url, size)
        yield Pieces(
            lambda at, length: storage.read_descriptor(descriptor, at, length), size, 1 << 20, 16 << 10
        )


def _refuse_empty(url: str, size: int) -> None:
    if not size:
        raise UserError(f"{url} is empty (0 bytes); make it again or remove it")


def group_members(members: Iterator[Member], where: str) -> list[Sample]:
    """Members in the tar's order -> samples."""
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


def members_of(span: bytes, where: str) -> Sample:
    """The sample in a span of a tar, from its first header to the next sample's; offsets are within the span.

    Raises UserError, naming `where`, if the span is not one whole sample.
    """
    table = group_members(walk(span, where, part=True), where)
    if len(table) != 1:
        keys = ", ".join(repr(sample.key) for sample in table[:3]) or "none"
        raise UserError(f"{where}: one sample is expected, found {len(table)} ({keys})")
    return table[0]


def walk(data: Bytes, where: str, part: bool = False) -> Iterator[Member]:
    """Every regular file, in order: ustar, GNU long names, pax headers.

    With `part`, `data` is a stretch of a tar from a first header up to another one, and its end is no error.
    Raises UserError that names the byte where a header is damaged; Truncated where the tar is cut off.
    """
    end = len(data)
    first = position = 0
    long_name: str | None = None
    pax: dict[str, str] = {}
    extended = False  # headers that describe the next one came before it
    while True:
        header = data[position : position + TAR_BLOCK_BYTES]
        if len(header) < TAR_BLOCK_BYTES:
            if part and position == end and not extended:
                return
            raise Truncated(
                f"{where} is cut off: {end} bytes and no end-of-archive mark, so its writer was interrupted; "
                "make it again or remove it"
            )
        raw_name, raw_size, checksum, kind, magic, prefix = FIELDS.unpack(header)
        try:
            # The lower half of Adler-32 is one more than the sum of the bytes, modulo 65521, and far faster.
            fault = (adler32(header) % 65536 - sum(checksum) + 255 - int(checksum[:6], 8)) % MODULUS
            size = int(raw_size[:11], 8) if raw_size[:11].isdigit() and raw_size[11] in b"\0 " else -1
        except ValueError:
            fault, size = 1, -1
        if fault:
            if header == ZERO:
                return
            _check_header(header, position, where)
        if size < 0:
            size = _number(raw_size, position, where)
        if "size" in pax and kind not in b"xg":
            size = int(pax["size"])
        content = position + TAR_BLOCK_BYTES
        if kind in b"123456":
            size = 0
        if content + size > end:
            raise Truncated(
                f"{where} is cut off: the member at byte {position} should end at byte {content + size}, "
                f"the file at byte {end}; make it again or remove it"
            )
        position = content + -(-size // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
        if kind in b"07\0":
            if extended:
                name = pax.get("path") or long_name or _name(raw_name, magic, prefix)
                long_name, pax, extended = None, {}, False
            else:
                name = _name(raw_name, magic, prefix)
            # Old tars mark a folder by its trailing slash alone.
            if name[-1:] != "/":
                yield Member(first, name, content, size)
            first = position
        elif kind in b"LKx":
            extended = True
            if size > LONGEST_HEADER:
                raise UserError(
                    f"{where} is damaged: the header at byte {content - TAR_BLOCK_BYTES} says that a name takes "
                    f"{size} bytes; make it again or remove it"
                )
            if kind == b"L":
                long_name = _text(data[content : content + size])
            elif kind == b"x":
                pax = _pax_records(data[content : content + size], where)
                if any(key.startswith("GNU.sparse.") for key in pax):
                    raise UserError(
                        f"{where}: sparse members are not supported; write the tar without --sparse"
                    )
        elif kind == b"S":
            raise UserError(f"{where}: sparse members are not supported; write the tar without --sparse")
        elif kind == b"g":
            if not extended:
                first = position
        else:
            long_name, pax, extended, first = None, {}, False, position


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


def _name(name: bytes, magic: bytes, prefix: bytes) -> str:
    # The prefix field belongs to POSIX ustar; old GNU headers ("ustar  ") keep other things there.
    if prefix[0] and magic == b"ustar\0":
        return f"{_text(prefix)}/{_text(name)}"
    return _text(name)


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


# The members of a sample that are taken for its image; where it has several, the first of these.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")


def image_member(members: Iterable[str]) -> str | None:
    """The member of a sample that is the image, if it has one."""
    present = set(members)
    return next((extension for extension in IMAGE_EXTENSIONS if extension in present), None)
