"""The reader that fetches samples of a source by their place, with an index or without one."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from typing import Any

from data_pipeline import storage
from data_pipeline.activity import reading
from data_pipeline.errors import UserError
from data_pipeline.manifest import INDEX_FOLDER, Manifest, open_source, stats_url, wrong_count
from data_pipeline.offsets import Offsets
from data_pipeline.scan import locate
from data_pipeline.tar import Sample, members_of

__all__ = ["Manifest", "ShardReader", "open_source"]


class ShardReader:
    """Reads samples of a source by (shard, position in the tar). One a process: it keeps files open.

    Places come from the index, else from the shard's headers when it is first touched: a walk over the tar, or its
    whole fetch from an object store. Training visits all shards again and again, so what was learned of a shard is
    kept, 4 bytes a sample; `learned_bytes` bounds it.
    """

    def __init__(
        self, manifest: Manifest, learned_bytes: int = 1 << 30, files: int = 64, fetched: int = 2
    ) -> None:
        self.manifest = manifest
        self.offsets = Offsets(manifest, learned_bytes)
        self._learned_bytes = learned_bytes
        self._warned = False
        self._files: OrderedDict[int, int] = OrderedDict()
        self._fetched: OrderedDict[int, bytes] = OrderedDict()
        self._limits = (files, fetched)
        self._remote = storage.is_remote(manifest.root)

    def __len__(self) -> int:
        return self.manifest.samples

    def read(self, shard: int, index: int) -> tuple[str, dict[str, bytes]]:
        """(key, extension -> content) of the `index`-th sample in the tar.

        Raises UserError if the tar does not hold what its count promised, or is no longer the one indexed.
        """
        sample, span = self._parse(shard, index)
        return sample.key, {
            extension: span[offset : offset + size] for extension, (offset, size) in sample.members.items()
        }

    def key(self, shard: int, index: int) -> str:
        """The sample's key alone."""
        return self._parse(shard, index)[0].key

    def reopen(self) -> None:
        """Forget open files and fetched bytes, which may be stale; what is known of the shards stays."""
        while self._files:
            os.close(self._files.popitem()[1])
        self._fetched.clear()

    def close(self) -> None:
        self.reopen()

    def _parse(self, shard: int, index: int) -> tuple[Sample, bytes]:
        if not self.offsets.knows(shard):
            self._learn(shard)
        start, stop = self.offsets.range(shard, index)
        span = self._span(shard, start, stop)
        try:
            return members_of(span, "its span"), span
        except UserError as error:
            url = self.manifest.url(shard)
            raise UserError(
                f"{url}: sample {index} should fill bytes {start} to {stop}, but {error}. The tar was changed or "
                f"damaged since its samples were located; make it again, then run: dromos data index "
                f"{self.manifest.root}"
            ) from None

    def _learn(self, shard: int) -> None:
        url = self.manifest.url(shard)
        starts = locate(self._fetch(shard) if self._remote else url, url)
        promised = int(self.manifest.tar_counts[shard])
        if len(starts) - 1 != promised:
            raise wrong_count(url, promised, len(starts) - 1, self._counted_in(url))
        self.offsets.learn(shard, starts)
        if self.offsets.forgot and not self._warned:
            self._warned = True
            warnings.warn(
                f"the places of the samples of {self.manifest.root} take more than {self._learned_bytes} bytes of "
                "memory in each process, so that tars are walked over again and again; "
                f"run: dromos data index {self.manifest.root}",
                stacklevel=2,
            )

    def _counted_in(self, url: str) -> str:
        if self.manifest.counted_by == "manifest":
            return f"the index {storage.join(self.manifest.root, INDEX_FOLDER)}"
        return stats_url(url) if self.manifest.counted_by == "stats" else "an earlier walk over it"

    def _span(self, shard: int, start: int, stop: int) -> bytes:
        if self._remote:
            if shard in self._fetched:
                return self._fetched[shard][start:stop]
            return storage.read_range(self.manifest.url(shard), start, stop - start)
        url = self.manifest.url(shard)
        with reading(url):
            if shard in self._files:
                self._files.move_to_end(shard)
            else:
                descriptor = os.open(storage.local_path(url), os.O_RDONLY)
                _remember(self._files, shard, descriptor, self._limits[0], os.close)
            data = storage.read_descriptor(self._files[shard], start, stop - start)
        if len(data) != stop - start:
            raise UserError(
                f"{url} is shorter than it was ({stop} bytes expected); make it again, then "
                f"run: dromos data index {self.manifest.root}"
            )
        return data

    def _fetch(self, shard: int) -> bytes:
        if shard not in self._fetched:
            _remember(self._fetched, shard, storage.read_bytes(self.manifest.url(shard)), self._limits[1])
        return self._fetched[shard]


def _remember(kept: OrderedDict[int, Any], key: int, value: Any, limit: int, drop: Any = None) -> None:
    kept[key] = value
    while len(kept) > limit:
        _, old = kept.popitem(last=False)
        if drop is not None:
            drop(old)
