"""What one walk over a tar's headers tells: where its samples begin, their members, and what is odd about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from data_pipeline.errors import UserError
from data_pipeline.sources.tar import (
    IMAGE_EXTENSIONS,
    TAR_BLOCK_BYTES,
    Bytes,
    Member,
    Truncated,
    open_tar,
    split_name,
    walk,
)

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


def locate(source: str | bytes, where: str) -> np.ndarray:
    """`Scan.starts` alone, of a tar or of its bytes."""
    return (scan(source, where) if isinstance(source, bytes) else scan_file(source)).starts


def _scan(members: Iterator[Member], where: str, starts: list[int]) -> Scan:
    names: list[str] = []
    places: list[tuple[int, int]] = []
    kinds: Counter[tuple[str, ...]] = Counter()
    keys: set[str] = set()
    split: list[str] = []
    end = 0
    last: str | None = None
    extensions: tuple[str, ...] = ()
    for first, name, offset, size in members:
        parts = split_name(name)
        if parts is None:
            continue
        key, extension = parts
        if key != last:
            kinds[extensions] += 1
            if key in keys and len(split) < NAMED:
                split.append(key)
            keys.add(key)
            starts.append(first)
            last, extensions = key, ()
        if extension in extensions:
            raise UserError(f"{where}: sample {key!r} has two members .{extension}; make the shard again")
        extensions += (extension,)
        names.append(name)
        places.append((offset, size))
        end = offset + -(-size // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
    kinds[extensions] += 1
    del kinds[()]  # what came before the first sample
    state = xxhash.xxh64("\0".join(names).encode("utf-8", "surrogateescape"))
    state.update(np.array(places, np.int64).tobytes())
    have: Counter[str] = Counter()
    for kind, samples in kinds.items():
        have.update(dict.fromkeys(kind, samples))
    imageless = sum(samples for kind, samples in kinds.items() if set(kind).isdisjoint(IMAGE_EXTENSIONS))
    return Scan(np.array([*starts, end], np.int64), state.hexdigest(), dict(have), imageless, split)
