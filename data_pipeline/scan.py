"""What one walk over a tar's headers tells: where its samples begin, their members, and what is odd about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import xxhash

from data_pipeline import storage
from data_pipeline.decode import IMAGE_EXTENSIONS
from data_pipeline.errors import UserError
from data_pipeline.tar import BLOCK, Bytes, Member, Pieces, Truncated, mapped, split_name, walk

NAMED = 8  # keys that are remembered by name


@dataclass(frozen=True, eq=False)
class Scan:
    """A tar's samples without their content.

    starts: int64 [samples + 1], byte of each sample's first header, then the end of the last sample
    fingerprint: 16 hex digits over names, sizes and offsets of all members
    members: extension -> samples that have it
    imageless: samples without an image member
    split: keys, the first few, whose members are not adjacent, so that they make several samples
    """

    starts: np.ndarray
    fingerprint: str
    members: dict[str, int]
    imageless: int
    split: list[str]

    @property
    def samples(self) -> int:
        return len(self.starts) - 1


def scan(data: Bytes, where: str) -> Scan:
    """Walk over the headers of a tar. Raises UserError as `walk` does; Truncated says what is whole of it."""
    starts: list[int] = []
    try:
        return _scan(walk(data, where), where, starts)
    except Truncated as error:
        raise Truncated(f"{error}; it holds {max(len(starts) - 1, 0)} whole samples before the cut") from None


def scan_file(url: str, size: int | None = None) -> Scan:
    """`scan` of a tar, local or remote; `size` is its bytes where they are known."""
    with open_tar(url, size) as data:
        return scan(data, url)


@contextmanager
def open_tar(url: str, size: int | None = None) -> Iterator[Bytes]:
    """A tar to walk over: mapped, or fetched in pieces."""
    if storage.is_remote(url):
        yield Pieces(url, storage.size(url) if size is None else size)
    else:
        with mapped(url) as data:
            yield data


def locate(source: str | bytes, where: str) -> np.ndarray:
    """`Scan.starts` alone, of a tar or of its bytes."""
    return (scan(source, where) if isinstance(source, bytes) else scan_file(source)).starts


def _scan(members: Iterator[Member], where: str, starts: list[int]) -> Scan:
    state = xxhash.xxh64()
    kinds: Counter[str] = Counter()
    keys: set[str] = set()
    split: list[str] = []
    imageless = end = 0
    last: str | None = None
    extensions: set[str] = set()
    for first, name, offset, size in members:
        parts = split_name(name)
        if parts is None:
            continue
        key, extension = parts
        if key != last:
            if last is not None:
                kinds.update(extensions)
                imageless += extensions.isdisjoint(IMAGE_EXTENSIONS)
            if key in keys and len(split) < NAMED:
                split.append(key)
            keys.add(key)
            starts.append(first)
            last, extensions = key, set()
        if extension in extensions:
            raise UserError(f"{where}: sample {key!r} has two members .{extension}; make the shard again")
        extensions.add(extension)
        state.update(f"{name}\0{offset}\0{size}\n".encode("utf-8", "surrogateescape"))
        end = offset + -(-size // BLOCK) * BLOCK
    if last is not None:
        kinds.update(extensions)
        imageless += extensions.isdisjoint(IMAGE_EXTENSIONS)
    return Scan(np.array([*starts, end], np.int64), state.hexdigest(), dict(kinds), imageless, split)
