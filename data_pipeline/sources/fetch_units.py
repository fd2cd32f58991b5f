"""Groups samples into the ranges that are fetched and cached together.

The order draws samples in runs of neighbours, so a fetch unit is a whole run, or several neighbouring ones.
"""

from __future__ import annotations

import numpy as np

from data_pipeline.order.source_order import run_length
from data_pipeline.sources.manifest import Manifest
from data_pipeline.sources.offsets import Offsets
from data_pipeline.storage.cache import ByteRange

UNIT_BYTES = 8 << 20  # target size of a unit of several runs
# Units hold several runs only if the cache's limit is at least this many times the source's size.
MIN_CACHE_RATIO = 4


class Units:
    """Fetch units of a source: one whole run, or several neighbouring runs.

    A unit may extend over a shard boundary; its part of each shard is fetched and cached separately.

    A small source has short runs, which would cost about one GET per sample. If its size is at most a quarter
    of the cache's limit, a unit is therefore as many neighbouring runs as make about 8 MiB.

    `run` and `length` are the samples per run and per unit; `first` is the number of samples before each shard.
    """

    def __init__(self, manifest: Manifest, offsets: Offsets | None, limit_bytes: int) -> None:
        self.manifest = manifest
        self.offsets = offsets
        self.first = np.concatenate([[0], np.cumsum(manifest.counts, dtype=np.int64)])
        samples, size = int(self.first[-1]), int(manifest.sizes.sum())
        self.run = run_length(samples)
        self.length = self.run
        if self.run < run_length(1 << 62) and size <= limit_bytes // MIN_CACHE_RATIO:
            self.length *= max(1, UNIT_BYTES * samples // max(1, self.run * size))

    def numbers(self, shards: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """Unit number of each sample, given its shard and manifest index. A unit may extend over a shard boundary."""
        return (self.first[shards] + indices) // self.length

    def ranges(self, shards: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(start, stop) bytes of the part of each unit that is in its shard. Raises KeyError as Offsets.ranges does."""
        assert self.offsets is not None
        low, high = self.samples(shards, units)
        start, _ = self.offsets.ranges(shards, self.manifest.tar_positions(shards, low))
        _, stop = self.offsets.ranges(shards, self.manifest.tar_positions(shards, high - 1))
        return start, stop

    def has_offsets(self, shard: int) -> bool:
        """True if the byte ranges of the shard's samples are available."""
        return self.offsets is not None and self.offsets.has(shard)

    def samples(self, shards: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Manifest indices [low, high) of the part of each unit that is in its shard."""
        low = np.maximum(units * self.length, self.first[shards]) - self.first[shards]
        high = np.minimum((units + 1) * self.length, self.first[shards + 1]) - self.first[shards]
        return low, high

    def byte_range(self, shard: int, start: int, stop: int) -> ByteRange:
        """Cache key of bytes [start, stop) of a shard."""
        versions = self.manifest.versions
        version = 0 if versions is None else int(versions[shard])
        return ByteRange(self.manifest.url(shard), int(self.manifest.sizes[shard]), version, start, stop)
