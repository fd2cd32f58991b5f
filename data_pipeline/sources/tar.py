"""Webdataset tars: deterministic writer, samples from members, sample and member naming."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.sources.left_out import DOTTED, META_MEMBER, LeftOut, dotted_images
from data_pipeline.sources.tar_members import BufferedTar, Member, SliceableBytes, iter_members

# The image of a sample is its member with the first of these extensions.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")


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


def member_table(
    source: str | os.PathLike[str] | bytes, name: str | None = None, left_out: LeftOut | None = None
) -> list[Sample]:
    """Samples of a tar, in its order, from the headers alone.

    source: path, s3:// URL or content of the tar; name: its name in error messages
    left_out: counts what is in no sample
    A sample's members must be adjacent, as webdataset requires. Raises UserError for a damaged or truncated tar.
    """
    if isinstance(source, bytes):
        where = name or "the tar"
        return group_members(iter_members(source, where, left_out=left_out), where, left_out)
    path = os.fspath(source)
    name = name or path
    with open_tar(path) as data:
        return group_members(iter_members(data, name, left_out=left_out), name, left_out)


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


def group_members(members: Iterator[Member], where: str, left_out: LeftOut | None = None) -> list[Sample]:
    """Group adjacent members into samples. Raises UserError if a sample has two members of one extension."""
    table: list[Sample] = []
    for _, member, offset, length, _ in members:
        parts = split_name(member)
        if parts is None:
            if left_out is not None:
                left_out.add_name(member)
            continue
        key, extension = parts
        if not table or table[-1].key != key:
            table.append(Sample(key, {}))
        if extension in table[-1].members:
            raise UserError(f"{where}: sample {key!r} has two members .{extension}; make the shard again")
        table[-1].members[extension] = (offset, length)
    if left_out is not None:
        for sample in table:
            dotted = dotted_images(sample.members, IMAGE_EXTENSIONS)
            if dotted:
                left_out.add(DOTTED, f"{sample.key}.{dotted[0]}", len(dotted))
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


def image_member(members: Iterable[str]) -> str | None:
    """Extension of a sample's image; None if it has no image."""
    present = set(members)
    return next((extension for extension in IMAGE_EXTENSIONS if extension in present), None)
