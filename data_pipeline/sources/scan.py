"""One pass over a tar's headers: where samples begin, which members they have, and defects such as split samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from data_pipeline.errors import UserError
from data_pipeline.sources.left_out import DOTTED, LeftOut, dotted_images
from data_pipeline.sources.tar import IMAGE_EXTENSIONS, open_tar, split_name
from data_pipeline.sources.tar_members import (
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
    left_out: links and files that are in no sample
    """

    starts: np.ndarray
    fingerprint: str
    members: dict[str, int]
    imageless: int
    split: list[str]
    left_out: LeftOut

    @property
    def samples(self) -> int:
        return len(self.starts) - 1


def scan(data: SliceableBytes, where: str) -> Scan:
    """Scan a tar's headers. Raises as `iter_members` does; a TruncatedTarError has the number of complete samples."""
    left_out = LeftOut()
    walk = _Walk(where, left_out)
    try:
        return walk.scan(iter_members(data, where, left_out=left_out))
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

    def __init__(self, where: str, left_out: LeftOut) -> None:
        self._where = where
        self._left_out = left_out
        self._starts: list[int] = []
        self._sets: Counter[tuple[str, ...]] = (
            Counter()
        )  # extensions of a sample -> samples before the last one
        self._last: dict[str, None] = {}  # extensions of the last sample

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
        extensions: dict[
            str, None
        ] = {}  # a dict, because names with dots can give a sample thousands of members
        for first, name, offset, size, stop in members:
            parts = split_name(name)
            if parts is None:
                self._left_out.add_name(name)
                continue
            key, extension = parts
            if key != last:
                if last is not None:
                    extension_sets[tuple(extensions)] += 1
                if key in keys and len(split) < MAX_SPLIT_KEYS:
                    split.append(key)
                keys.add(key)
                starts.append(first)
                last, extensions = key, {}
                self._last = extensions
            if extension in extensions:
                raise UserError(f"{where}: sample {key!r} has two members .{extension}; make the shard again")
            extensions[extension] = None
            names.append(name)
            contents.append((offset, size))
            end = stop
        if last is not None:
            extension_sets[tuple(extensions)] += 1
        self._count_dotted(names)
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
            np.array([*starts, end], np.int64),
            state.hexdigest(),
            dict(by_extension),
            imageless,
            split,
            self._left_out,
        )

    def _count_dotted(self, names: list[str]) -> None:
        """Count the images behind a second dot; `names` are searched for the first one only if there are any."""
        found: set[str] = set()
        number = 0
        for extensions, samples in self._sets.items():
            dotted = dotted_images(extensions, IMAGE_EXTENSIONS)
            found.update(dotted)
            number += samples * len(dotted)
        if number:
            first = next(name for name in names if (split_name(name) or ("", ""))[1] in found)
            self._left_out.add(DOTTED, first, number)
