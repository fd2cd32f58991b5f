"""`ShardReader`: (shard, index) to key and members, on disk or remote, with or without an index."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data_pipeline import storage
from data_pipeline.activity import reading
from data_pipeline.errors import UserError
from data_pipeline.sources.manifest import INDEX_FOLDER, Manifest, stats_url, wrong_count_error
from data_pipeline.sources.offsets import Offsets
from data_pipeline.sources.scan import sample_starts
from data_pipeline.sources.sidecars import read_counts
from data_pipeline.sources.tar import Sample, member_table, parse_sample
from data_pipeline.sources.tar_members import LinkOutsideError

if TYPE_CHECKING:
    from data_pipeline.sources.fetch_units import Units
    from data_pipeline.sources.remote_shards import RemoteShards
    from data_pipeline.storage.cache import CacheSettings


MAX_LINKED_TABLES = 4  # tars with hard links whose members are kept in memory


class ShardReader:
    """Reads samples of a source by (shard, position in the tar). One per process, because it keeps files open.

    Byte ranges come from the index, else from the shard's headers at its first use: the tar is scanned on disk, or
    fetched whole from an object store. Training visits every shard many times, so the ranges found stay in memory,
    4 bytes per sample and at most `scanned_bytes`. `files` is the maximum number of open tars.
    """

    def __init__(
        self,
        manifest: Manifest,
        cache: CacheSettings | None = None,
        scanned_bytes: int = 1 << 30,
        files: int = 64,
    ) -> None:
        self.manifest = manifest
        self.offsets = Offsets(manifest, scanned_bytes, cache)
        self._scanned_bytes = scanned_bytes
        self._warned = False
        self._files: OrderedDict[int, int] = OrderedDict()
        self._max_files = files
        self._linked_tables: OrderedDict[int, list[Sample]] = OrderedDict()
        self._remote: RemoteShards | None = None
        if storage.is_remote(manifest.root):
            from data_pipeline.sources.remote_shards import RemoteShards

            self._remote = RemoteShards(manifest, self.offsets, cache)

    @property
    def units(self) -> Units | None:
        """Fetch units of a remote source; None for a local one."""
        return None if self._remote is None else self._remote.units

    def __len__(self) -> int:
        return self.manifest.samples

    def read(self, shard: int, index: int) -> tuple[str, dict[str, bytes]]:
        """(key, {extension: content}) of the sample at position `index` of the tar.

        Raises UserError if the tar does not match its count or its index, ReadError if the object store fails.
        """
        sample, span = self._parse(shard, index)
        return sample.key, {
            extension: span[offset : offset + size] for extension, (offset, size) in sample.members.items()
        }

    def expect(self, shards: Sequence[int], indices: Sequence[int]) -> None:
        """Announce the samples that are read next, in order; remote ones may be read ahead, in parallel."""
        if self._remote is not None:
            self._remote.expect(shards, indices)

    def key(self, shard: int, index: int) -> str:
        """Key of a sample."""
        return self._parse(shard, index)[0].key

    def reopen(self) -> None:
        """Close files and drop fetched bytes, which may be stale; byte ranges from scans stay."""
        self._linked_tables.clear()
        while self._files:
            os.close(self._files.popitem()[1])
        if self._remote is not None:
            self._remote.close()

    def close(self) -> None:
        self.reopen()

    def _parse(self, shard: int, index: int) -> tuple[Sample, bytes]:
        """The sample at position `index` of the tar, and the bytes to which its offsets refer."""
        if not self.offsets.has(shard):
            self._scan(shard)
        start, stop = self.offsets.range(shard, index)
        span = self._span(shard, index, start, stop)
        try:
            return parse_sample(span, "the span"), span
        except LinkOutsideError:
            return self._parse_linked(shard, index)
        except UserError as error:
            url = self.manifest.url(shard)
            raise UserError(
                f"{url}: no sample at bytes {start} to {stop}, where sample {index} was when the tar was indexed or "
                "scanned, so it was changed or damaged since; make it again, then run: "
                f"dromos data index {self.manifest.root}"
            ) from error

    def _parse_linked(self, shard: int, index: int) -> tuple[Sample, bytes]:
        """`_parse` of a sample with hard links to files of other samples: its members are read one by one."""
        url = self.manifest.url(shard)
        table = self._linked_tables.get(shard)
        if table is None:
            table = self._linked_tables[shard] = member_table(url)
            if len(self._linked_tables) > MAX_LINKED_TABLES:
                self._linked_tables.popitem(last=False)
        expected = int(self.manifest.tar_counts[shard])
        if len(table) != expected:
            raise wrong_count_error(url, expected, len(table), self._counted_in(url))
        versions = self.manifest.versions
        version = 0 if versions is None else int(versions[shard])
        contents: list[bytes] = []
        members: dict[str, tuple[int, int]] = {}
        position = 0
        for extension, (offset, size) in table[index].members.items():
            contents.append(storage.read_range(url, offset, size, int(self.manifest.sizes[shard]), version))
            members[extension] = position, size
            position += size
        return Sample(table[index].key, members), b"".join(contents)

    def _scan(self, shard: int) -> None:
        """Find the byte ranges of a shard's samples. Raises UserError if their number is not the manifest's count."""
        url = self.manifest.url(shard)
        starts = sample_starts(url, url) if self._remote is None else self._remote.sample_starts(shard)
        expected = int(self.manifest.tar_counts[shard])
        if len(starts) - 1 != expected:
            raise wrong_count_error(url, expected, len(starts) - 1, self._counted_in(url))
        self.offsets.add(shard, starts)
        if self.offsets.evicted and not self._warned:
            self._warned = True
            warnings.warn(
                f"the byte ranges of the samples of {self.manifest.root} take more than {self._scanned_bytes} bytes of "
                "memory per process, so tars are scanned repeatedly; "
                f"run: dromos data index {self.manifest.root}",
                stacklevel=2,
            )

    def _counted_in(self, url: str) -> str:
        """Name of the file that the count of a shard comes from, for messages."""
        if self.manifest.counted_by == "manifest":
            return f"the index {storage.join(self.manifest.root, INDEX_FOLDER)}"
        if self.manifest.counted_by == "tar":
            return "an earlier scan of it"
        if storage.exists(stats_url(url)):
            return stats_url(url)
        counts = read_counts(self.manifest.root, [url], storage.sizes([url]))
        return (
            counts[url].where if url in counts else "the index file of another tool (.idx, .nv-meta or wids)"
        )

    def _span(self, shard: int, index: int, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a shard. Raises UserError if a local tar ends earlier."""
        if self._remote is not None:
            return self._remote.span(shard, index, start, stop)
        url = self.manifest.url(shard)
        with reading(url):
            if shard in self._files:
                self._files.move_to_end(shard)
            else:
                descriptor = os.open(storage.local_path(url), os.O_RDONLY)
                self._files[shard] = descriptor
                if len(self._files) > self._max_files:
                    os.close(self._files.popitem(last=False)[1])
            data = storage.read_descriptor(self._files[shard], start, stop - start)
        if len(data) != stop - start:
            raise UserError(
                f"{url} is shorter than before ({stop} bytes expected); make it again, then "
                f"run: dromos data index {self.manifest.root}"
            )
        return data
