"""order_digest and batch_digest: one hash per row, summed modulo 2**64.

The sum does not depend on the world size or on the order of rows, so runs with different layouts can be compared.
"""

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
    """xxh64 of one row: of its assignment (attempt 0, no crop, caption -1) or of the sample that was served.

    First the integers are hashed, 8 bytes each, little endian; then each text after its length. So two different rows
    never give the same bytes. `shard_path` is relative to the source's root. `crop` is the result of decode_image,
    () for none.
    """
    numbers = (row, index, attempt, epoch, caption, len(crop), *crop)
    texts = _framed(stream) + _framed(source) + _framed(shard_path)
    return xxhash.xxh64_intdigest(struct.pack(f"<{len(numbers)}q", *numbers) + texts)


@lru_cache(maxsize=4096)
def _framed(text: str) -> bytes:
    """UTF-8 bytes of a text after their length; cached, since few names occur in many rows."""
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<q", len(raw)) + raw


def add(a: int, b: int) -> int:
    """Sum of two digests modulo 2**64."""
    return (int(a) + int(b)) & MASK_64


def hex16(x: int) -> str:
    """A digest as written in logs and metrics: 16 hexadecimal digits."""
    return f"{int(x) & MASK_64:016x}"
