"""Witness of the data: a digest a row, summed modulo 2**64, so that the sum depends on no split over ranks."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

import xxhash

MASK_64 = 2**64 - 1


def row_digest(
    stream: str,
    row: int,
    source: str,
    shard_path: str,
    index: int,
    attempt: int,
    epoch: int,
    crop: Sequence[int],
    caption: int,
) -> int:
    """xxh64 of what one row was assigned (attempt 0, no crop, caption -1) or was served.

    Texts go in with their length before them and integers as 8 bytes, little endian, so that two different rows never
    make the same bytes. `shard_path` is the path below the source's root; `crop` is what decode reports, () for none.
    """
    numbers = (row, index, attempt, epoch, caption, len(crop), *crop)
    texts = _framed(stream) + _framed(source) + _framed(shard_path)
    return xxhash.xxh64_intdigest(struct.pack(f"<{len(numbers)}q", *numbers) + texts)


@lru_cache(maxsize=4096)
def _framed(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<q", len(raw)) + raw


def add(a: int, b: int) -> int:
    """Sum of two digests modulo 2**64."""
    return (int(a) + int(b)) & MASK_64


def hex16(x: int) -> str:
    """A digest as it stands in logs: 16 hexadecimal digits."""
    return f"{int(x) & MASK_64:016x}"
