"""One pass over a tar's headers: where samples begin, which members they have, and defects such as split samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from data_pipeline.errors import UserError
from data_pipeline.sources.tar import IMAGE_EXTENSIONS, open_tar, split_name
from data_pipeline.sources.tar_members import (
    TAR_BLOCK_BYTES,
    Member,
    SliceableBytes,
    TruncatedTarError,
    iter_members,
)

MAX_SPLIT_KEYS = 8  # keys of split samples that a Scan lists


@dataclass(frozen=True, eq=False)
class Scan:
    """Samples of a tar, from its headers.

    starts: int64 [samples + 1], byte of each sample's first header, then the end of the last sample
    fingerprint: hash of the names, sizes and offsets of all members, as 16 hex digits
    members: extension -> number of samples that have it
    imageless: number of samples without an image member
    split: first few keys whose members are not adjacent, so that one key counts as several samples
    """

    starts: np.ndarray
    fingerprint: str
    members: dict[str, int]
    imageless: int
    split: list[str]

    @property
    def samples(self) -> int:
        return len(self.starts) - 1


def scan(data: SliceableBytes, where: str) -> Scan:
    """Scan a tar's headers. Raises as `iter_members` does; a TruncatedTarError has the number of complete samples."""
    walk = _Walk(where)
    try:
        return walk.scan(iter_members(data, where))
    except TruncatedTarError as error:
        raise type(error)(
            f"{error}; it holds {walk.complete_samples()} complete samples before {error.place}"
        ) from None


def scan_file(url: str, size: int | None = None) -> Scan:
    """Scan a local or remote tar; `size` is its size in bytes if known."""
    with open_tar(url, size) as data:
        return scan(data, url)


def sample_starts(source: str | bytes, where: str) -> np.ndarray:
    """`Scan.starts` of a tar, given its URL or its content."""
    return (scan(source, where) if isinstance(source, bytes) else scan_file(source)).starts


class _Walk:
    """State of a scan, which is of use also after the scan failed."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._starts: list[int] = []
        self._sets: Counter[tuple[str, ...]] = (
            Counter()
        )  # extensions of a sample -> samples before the last one
        self._last: tuple[str, ...] = ()  # extensions of the last sample

    def complete_samples(self) -> int:
        """Samples of which no member is missing: the last one counts if an earlier one has the same extensions."""
        alike = not self._sets or any(set(self._last) >= set(extensions) for extensions in self._sets)
        return len(self._starts) if alike else len(self._starts) - 1

    def scan(self, members: Iterator[Member]) -> Scan:
        where, starts, extension_sets = self._where, self._starts, self._sets
        names: list[str] = []
        contents: list[tuple[int, int]] = []  # (offset, size) of each member
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
                if last is not None:
                    extension_sets[extensions] += 1
                if key in keys and len(split) < MAX_SPLIT_KEYS:
                    split.append(key)
                keys.add(key)
                starts.append(first)
                last, extensions = key, ()
            if extension in extensions:
                raise UserError(f"{where}: sample {key!r} has two members .{extension}; make the shard again")
            extensions += (extension,)
            self._last = extensions
            names.append(name)
            contents.append((offset, size))
            end = offset + -(-size // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
        if last is not None:
            extension_sets[extensions] += 1
        state = xxhash.xxh64("\0".join(names).encode("utf-8", "surrogateescape"))
        state.update(np.array(contents, np.int64).tobytes())
        by_extension: Counter[str] = Counter()
        for present, samples in extension_sets.items():
            by_extension.update(dict.fromkeys(present, samples))
        imageless = sum(
            samples
            for present, samples in extension_sets.items()
            if set(present).isdisjoint(IMAGE_EXTENSIONS)
        )
        return Scan(
            np.array([*starts, end], np.int64), state.hexdigest(), dict(by_extension), imageless, split
        )
