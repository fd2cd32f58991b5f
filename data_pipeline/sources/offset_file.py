"""On-disk format of the packed offset file: about two bytes per sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from data_pipeline.errors import UserError
from data_pipeline.sources.tar import TAR_BLOCK_BYTES

if TYPE_CHECKING:
    pass


GROUP = 64  # entries that share a base
WIDEST = (2**32 - 1) * TAR_BLOCK_BYTES


@dataclass(frozen=True, eq=False)
class OffsetFile:
    """Where a source's offset file lies, and of each shard's block in it the first byte, the bytes of an entry (2 or
    4), and a hash."""

    url: str
    blocks: np.ndarray  # int64 [shards]
    widths: np.ndarray  # uint8 [shards]
    checks: np.ndarray  # uint64 [shards]


def pack_starts(starts: np.ndarray) -> tuple[bytes, int]:
    """A shard's block and the width of its entries.

    `starts` is int64 [samples + 1], bytes, all multiples of 512: each sample's first header, then the end of the
    last. With 2-byte entries a block holds, for each 64 entries, a uint32 base and then a uint16 an entry, in units
    of 512 bytes, padded to 4 bytes; where 64 neighbours span 32 MiB or more, a uint32 an entry instead. Base and
    entries of a sample lie in one page: touching pages is most of the time of a process's first batch.
    Raises UserError for a tar of 2 TiB or more.
    """
    if starts[-1] > WIDEST:
        raise UserError(f"ends at byte {starts[-1]}; tars of 2 TiB and more are not supported, split it")
    entries = starts // TAR_BLOCK_BYTES
    groups = np.pad(entries, (0, -len(entries) % GROUP), mode="edge").reshape(-1, GROUP)
    bases = groups[:, :1]
    if (groups - bases).max() > 65535:
        return entries.astype("<u4").tobytes(), 4
    packed = np.concatenate([bases.astype("<u4").view("<u2"), (groups - bases).astype("<u2")], axis=1)
    block = packed.tobytes()[: 4 * len(groups) + 2 * len(entries)]
    return block + bytes(-len(block) % 4), 2


def block_bytes(samples: int, width: int) -> int:
    """Length of the block of a shard with so many samples."""
    if width == 4:
        return 4 * (samples + 1)
    length = 4 * (samples // GROUP + 1) + 2 * (samples + 1)
    return length + -length % 4


def check_of(block: bytes | memoryview, samples: int) -> int:
    """Hash of a shard's block and count."""
    return xxhash.xxh64_intdigest(block, samples)
