"""Where each sample lies: the index of a source, and the reader that fetches samples with or without one."""

from __future__ import annotations

import os
import re
import warnings
from collections import OrderedDict
from typing import Any

import numpy as np
import xxhash

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.manifest import (
    FORMAT,
    INDEX_FOLDER,
    MEMBERS,
    Manifest,
    Shard,
    make_manifest,
    open_source,
    read_index,
    read_stats,
    shard_lengths,
    stats_url,
    tokenizer_of,
    wrong_count,
)
from data_pipeline.tables import PackedTable, pack_table
from data_pipeline.tar import Sample, member_table

__all__ = ["Manifest", "Shard", "ShardReader", "build_index", "open_source"]


def build_index(path: str) -> Manifest:
    """Walk every tar of a source once; write `ROOT/_index/`: shards.parquet and one packed file of offsets.

    The offsets are written first, under a name that holds their hash; shards.parquet, which names them,
    appears last and whole: a reader sees the old index or the new one. Raises UserError if a `_stats.json`
    contradicts its tar.
    """
    import pyarrow as pa

    urls = storage.list_shards(path)
    root = storage.root_of(path)
    lengths = shard_lengths(urls, path)
    stats = read_stats(urls)
    blocks: list[bytes] = []
    counts: list[int] = []
    for url in urls:
        table = member_table(url)
        if url in stats and stats[url]["successes"] != len(table):
            raise wrong_count(url, stats[url]["successes"], len(table), stats_url(url))
        blocks.append(pack_table(table))
        counts.append(len(table))
    tokenizer = tokenizer_of(stats)
    name = os.path.basename(root) or root
    manifest = make_manifest(name, root, urls, lengths, counts, "manifest", tokenizer)
    content = b"".join(blocks)
    members = f"members-{xxhash.xxh64_hexdigest(content)}.bin"
    ends = np.cumsum([len(block) for block in blocks], dtype=np.int64)
    rows = pa.table(
        {
            "path": [shard.path for shard in manifest.shards],
            "count": pa.array(counts, pa.int64()),
            "size": pa.array([shard.size for shard in manifest.shards], pa.int64()),
            "index_end": pa.array(ends, pa.int64()),
        },
        metadata={"dromos_index": FORMAT, "members": members, "tokenizer": tokenizer or ""},
    )
    folder = storage.join(root, INDEX_FOLDER)
    storage.publish(storage.join(folder, members), content)
    storage.publish_table(storage.join(folder, "shards.parquet"), rows)
    _remove_old(folder, keep=members)
    return manifest


def _remove_old(folder: str, keep: str) -> None:
    """Offsets of an earlier index; a reader that has them mapped keeps them."""
    if not storage.is_remote(folder):
        for name in os.listdir(folder):
            if re.fullmatch(MEMBERS, name) and name != keep:
                os.unlink(os.path.join(folder, name))


class ShardReader:
    """Reads samples of a source by (shard, index in the shard). One a process: it keeps files open.

    Offsets come from the index, else from the shard's headers when it is first touched: a walk over the tar, or
    its whole fetch from an object store. Training visits all shards again and again, so the table of every shard
    seen is kept, packed to some tens of bytes a sample; `table_bytes` bounds what these take of memory.
    """

    def __init__(
        self, manifest: Manifest, table_bytes: int = 1 << 30, files: int = 64, fetched: int = 2
    ) -> None:
        self.manifest = manifest
        self._tables: OrderedDict[int, PackedTable] = OrderedDict()
        self._table_bytes = 0
        self._files: OrderedDict[int, int] = OrderedDict()
        self._fetched: OrderedDict[int, bytes] = OrderedDict()
        self._limits = (table_bytes, files, fetched)
        self._indexed: _Index | None = _Index.open(manifest) if manifest.counted_by == "manifest" else None

    def __len__(self) -> int:
        return self.manifest.samples

    def locate(self, shard: int, index: int) -> Sample:
        """Key and member offsets of a sample."""
        return self._table(shard)[index]

    def read(self, shard: int, index: int) -> tuple[str, dict[str, bytes]]:
        """(key, extension -> content). Raises UserError if the tar does not hold what its count promised."""
        sample = self.locate(shard, index)
        if not sample.members:
            return sample.key, {}
        start = min(offset for offset, _ in sample.members.values())
        stop = max(offset + length for offset, length in sample.members.values())
        # Members are adjacent, so one read of the whole span costs less than one a member.
        span = self._bytes(shard, start, stop - start)
        return sample.key, {
            extension: span[offset - start : offset - start + length]
            for extension, (offset, length) in sample.members.items()
        }

    def reopen(self) -> None:
        """Forget open files and fetched bytes, which may be stale; what is known of the shards stays."""
        while self._files:
            os.close(self._files.popitem()[1])
        self._fetched.clear()

    def close(self) -> None:
        self.reopen()
        self._tables.clear()
        self._table_bytes = 0

    def _table(self, shard: int) -> PackedTable:
        if shard in self._tables:
            self._tables.move_to_end(shard)
            return self._tables[shard]
        url = self.manifest.url(shard)
        if self._indexed is not None:
            table = self._indexed.table(self.manifest.shards[shard].path)
        else:
            walked = member_table(self._fetch(shard) if storage.is_remote(url) else url, url)
            table = PackedTable(np.frombuffer(pack_table(walked), np.uint8))
        promised = self.manifest.shards[shard].count
        if len(table) != promised:
            raise wrong_count(url, promised, len(table), self._counted_in(url))
        self._keep(shard, table)
        return table

    def _keep(self, shard: int, table: PackedTable) -> None:
        self._tables[shard] = table
        self._table_bytes += table.own_bytes
        while self._table_bytes > self._limits[0] and len(self._tables) > 1:
            self._table_bytes -= self._tables.popitem(last=False)[1].own_bytes
            if self._indexed is None:
                warnings.warn(
                    f"the places of the samples of {self.manifest.root} take more than {self._limits[0]} bytes of "
                    "memory in each process, so that tars are walked over again and again; "
                    f"run: dromos data index {self.manifest.root}",
                    stacklevel=2,
                )

    def _counted_in(self, url: str) -> str:
        if self.manifest.counted_by == "manifest":
            return f"the index {storage.join(self.manifest.root, INDEX_FOLDER)}"
        return stats_url(url) if self.manifest.counted_by == "stats" else "an earlier walk over it"

    def _bytes(self, shard: int, offset: int, length: int) -> bytes:
        url = self.manifest.url(shard)
        if shard in self._fetched:
            return self._fetched[shard][offset : offset + length]
        if storage.is_remote(url):
            return storage.read_range(url, offset, length)
        if shard not in self._files:
            _remember(
                self._files, shard, os.open(storage.local_path(url), os.O_RDONLY), self._limits[1], os.close
            )
        self._files.move_to_end(shard)
        data = storage.read_descriptor(self._files[shard], offset, length)
        if len(data) != length:
            raise UserError(
                f"{url} is shorter than it was ({offset + length} bytes expected); make it again, then "
                f"run: dromos data index {self.manifest.root}"
            )
        return data

    def _fetch(self, shard: int) -> bytes:
        if shard not in self._fetched:
            _remember(self._fetched, shard, storage.read_bytes(self.manifest.url(shard)), self._limits[2])
        return self._fetched[shard]


class _Index:
    """The packed offsets of an indexed source; mapped if local, read by ranges if remote."""

    def __init__(self, url: str, blocks: dict[str, tuple[int, int]]) -> None:
        self._url = url
        self._blocks = blocks
        self._mapped = None if storage.is_remote(url) else np.memmap(storage.local_path(url), np.uint8, "r")

    @classmethod
    def open(cls, manifest: Manifest) -> _Index:
        indexed = read_index(manifest.root)
        if indexed is None:
            raise UserError(f"the index of {manifest.root} is gone; run: dromos data index {manifest.root}")
        table, url = indexed
        ends = table["index_end"].to_pylist()
        starts = [0, *ends[:-1]]
        paths = table["path"].to_pylist()
        return cls(url, {path: (a, b) for path, a, b in zip(paths, starts, ends, strict=True)})

    def table(self, path: str) -> PackedTable:
        start, stop = self._blocks[path]
        if self._mapped is not None:
            return PackedTable(self._mapped[start:stop])
        return PackedTable(np.frombuffer(storage.read_range(self._url, start, stop - start), np.uint8))


def _remember(kept: OrderedDict[int, Any], key: int, value: Any, limit: int, drop: Any = None) -> None:
    kept[key] = value
    while len(kept) > limit:
        _, old = kept.popitem(last=False)
        if drop is not None:
            drop(old)
