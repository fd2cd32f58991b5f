"""On-disk format of the packed offset file: about two bytes per sample.

The file is the shards' blocks one after the other. A block holds the byte at which each sample of its shard begins,
then the end of the last one, in units of 512 bytes:

- width 2: for each group of 64 entries, a uint32 base and one uint16 per entry (the difference to the base); padded
  to 4 bytes. Base and entries of a sample are in one page, because page faults take most of the time of a process's
  first batch.
- width 4: one uint32 per entry, for a shard in which 64 neighbours span 32 MiB or more.

All integers are little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash

from data_pipeline.errors import UserError
from data_pipeline.sources.tar_members import TAR_BLOCK_BYTES

GROUP = 64  # entries that share a base
MAX_OFFSET = (2**32 - 1) * TAR_BLOCK_BYTES  # bytes


@dataclass(frozen=True, eq=False)
class OffsetFile:
    """A source's offset file, and its block of each shard."""

    url: str
    blocks: np.ndarray  # int64 [shards], first byte of the block
    widths: np.ndarray  # uint8 [shards], bytes per entry: 2 or 4
    checks: np.ndarray  # uint64 [shards], `check_of` the block


def pack_starts(starts: np.ndarray) -> tuple[bytes, int]:
    """Return a shard's block and the width of its entries.

    `starts` is int64 [samples + 1], in bytes, multiples of 512: each sample's first header, then the end of the last
    sample. Raises UserError for a tar of 2 TiB or more.
    """
    if starts[-1] > MAX_OFFSET:
        raise UserError(f"ends at byte {starts[-1]}; tars of 2 TiB or more are not supported; split it")
    entries = starts // TAR_BLOCK_BYTES
    groups = np.pad(entries, (0, -len(entries) % GROUP), mode="edge").reshape(-1, GROUP)
    bases = groups[:, :1]
    if (groups - bases).max() > 65535:
        return entries.astype("<u4").tobytes(), 4
    packed = np.concatenate([bases.astype("<u4").view("<u2"), (groups - bases).astype("<u2")], axis=1)
    block = packed.tobytes()[: 4 * len(groups) + 2 * len(entries)]
    return block + bytes(-len(block) % 4), 2


def block_bytes(samples: int, width: int) -> int:
    """Length in bytes of the block of a shard with `samples` samples."""
    if width == 4:
        return 4 * (samples + 1)
    length = 4 * (samples // GROUP + 1) + 2 * (samples + 1)
    return length + -length % 4


def check_of(block: bytes | memoryview, samples: int) -> int:
    """Hash of a shard's block and sample count."""
    return xxhash.xxh64_intdigest(block, samples)
