"""The reader that fetches samples of a source by their place, with an index or without one."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data_pipeline import storage
from data_pipeline.activity import reading
from data_pipeline.errors import UserError
from data_pipeline.sources.manifest import INDEX_FOLDER, Manifest, stats_url, wrong_count
from data_pipeline.sources.offsets import Offsets
from data_pipeline.sources.scan import locate
from data_pipeline.sources.tar import Sample, members_of

if TYPE_CHECKING:
    from data_pipeline.sources.fetch_units import Units
    from data_pipeline.sources.remote_shards import RemoteShards
    from data_pipeline.storage.cache import CacheSettings


class ShardReader:
    """Reads samples of a source by (shard, position in the tar). One a process: it keeps files open.

    Places come from the index, else from the shard's headers when it is first touched: a walk over the tar, or its
    whole fetch from an object store. Training visits all shards again and again, so what was learned of a shard is
    kept, 4 bytes a sample; `learned_bytes` bounds it.
    """

    def __init__(
        self,
        manifest: Manifest,
        cache: CacheSettings | None = None,
        learned_bytes: int = 1 << 30,
        files: int = 64,
    ) -> None:
        self.manifest = manifest
        self.offsets = Offsets(manifest, learned_bytes, cache)
        self._learned_bytes = learned_bytes
        self._warned = False
        self._files: OrderedDict[int, int] = OrderedDict()
        self._most_files = files
        self._remote: RemoteShards | None = None
        if storage.is_remote(manifest.root):
            from data_pipeline.sources.remote_shards import RemoteShards

            self._remote = RemoteShards(manifest, self.offsets, cache)

    @property
    def units(self) -> Units | None:
        """What is fetched at once of a source in an object store."""
        return None if self._remote is None else self._remote.units

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

    def expect(self, shards: Sequence[int], indices: Sequence[int]) -> None:
        """The samples that will be read next, in order: remote ones may be fetched meanwhile, several at once."""
        if self._remote is not None:
            self._remote.expect(shards, indices)

    def key(self, shard: int, index: int) -> str:
        """The sample's key alone."""
        return self._parse(shard, index)[0].key

    def reopen(self) -> None:
        """Forget open files and fetched bytes, which may be stale; what is known of the shards stays."""
        while self._files:
            os.close(self._files.popitem()[1])
        if self._remote is not None:
            self._remote.forget()

    def close(self) -> None:
        self.reopen()

    def _parse(self, shard: int, index: int) -> tuple[Sample, bytes]:
        if not self.offsets.knows(shard):
            self._learn(shard)
        start, stop = self.offsets.range(shard, index)
        span = self._span(shard, index, start, stop)
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
        starts = locate(url, url) if self._remote is None else self._remote.located(shard)
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
        return {
            "stats": stats_url(url),
            "sidecar": "what another tool wrote beside it (.idx, .nv-meta or the index of wids)",
            "tar": "an earlier walk over it",
        }[self.manifest.counted_by]

    def _span(self, shard: int, index: int, start: int, stop: int) -> bytes:
        if self._remote is not None:
            return self._remote.span(shard, index, start, stop)
        url = self.manifest.url(shard)
        with reading(url):
            if shard in self._files:
                self._files.move_to_end(shard)
            else:
                descriptor = os.open(storage.local_path(url), os.O_RDONLY)
                self._files[shard] = descriptor
                if len(self._files) > self._most_files:
                    os.close(self._files.popitem(last=False)[1])
            data = storage.read_descriptor(self._files[shard], start, stop - start)
        if len(data) != stop - start:
            raise UserError(
                f"{url} is shorter than it was ({stop} bytes expected); make it again, then "
                f"run: dromos data index {self.manifest.root}"
            )
        return data
