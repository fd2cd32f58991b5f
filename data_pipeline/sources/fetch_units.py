"""Groups samples into the ranges that are fetched and cached together."""

from __future__ import annotations

import numpy as np

from data_pipeline.order.source_order import run_length
from data_pipeline.sources.manifest import Manifest
from data_pipeline.sources.offsets import Offsets
from data_pipeline.storage.cache import ByteRange

UNIT_BYTES = 8 << 20
COMFORTABLY = (
    4  # a source takes at most a fourth of the cache's limit to be read in units larger than its runs
)


class Units:
    """A source's samples in the pieces that are fetched and cached: whole runs of neighbours, cut at shard edges.

    A small source has short runs, and would cost a GET a sample; where all of it has room in the cache, a unit is as
    many neighbouring runs as make about 8 MiB.
    """

    def __init__(self, manifest: Manifest, offsets: Offsets | None, limit_bytes: int) -> None:
        self.manifest = manifest
        self.offsets = offsets
        self.first = np.concatenate([[0], np.cumsum(manifest.counts, dtype=np.int64)])
        samples, size = int(self.first[-1]), int(manifest.sizes.sum())
        self.run = run_length(samples)
        self.length = self.run
        if self.run < run_length(1 << 62) and size <= limit_bytes // COMFORTABLY:
            self.length *= max(1, UNIT_BYTES * samples // max(1, self.run * size))

    def number(self, shards: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Unit of each sample; `indices` are those of the manifest. A unit may lie on both sides of a shard's edge."""
        return (self.first[shards] + indices) // self.length

    def ranges(self, shards: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(start, stop) in bytes of what lies of each unit in its shard. Raises KeyError as Offsets.ranges does."""
        assert self.offsets is not None
        low, high = self.samples(shards, units)
        start, _ = self.offsets.ranges(shards, self.manifest.in_tar(shards, low))
        _, stop = self.offsets.ranges(shards, self.manifest.in_tar(shards, high - 1))
        return start, stop

    def knows(self, shard: int) -> bool:
        """Are the places of the shard's samples known?"""
        return self.offsets is not None and self.offsets.knows(shard)

    def samples(self, shards: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices [low, high) of what lies of each unit in its shard."""
        low = np.maximum(units * self.length, self.first[shards]) - self.first[shards]
        high = np.minimum((units + 1) * self.length, self.first[shards + 1]) - self.first[shards]
        return low, high

    def part(self, shard: int, start: int, stop: int) -> ByteRange:
        """Bytes of a shard as the cache names them."""
        versions = self.manifest.versions
        version = 0 if versions is None else int(versions[shard])
        return ByteRange(self.manifest.url(shard), int(self.manifest.sizes[shard]), version, start, stop)
