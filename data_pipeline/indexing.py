"""`dromos data index`: every tar of a source walked once; shards.parquet and one packed file of offsets."""

from __future__ import annotations

import os
import re

import numpy as np
import xxhash

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.manifest import (
    FORMAT,
    INDEX_FOLDER,
    OFFSETS,
    Manifest,
    make_manifest,
    open_source,
    read_stats,
    shard_lengths,
    stats_url,
    tokenizer_of,
    wrong_count,
)
from data_pipeline.offsets import pack_starts
from data_pipeline.scan import scan, scan_file


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
    widths: list[int] = []
    for url in urls:
        found = scan(storage.read_bytes(url), url) if storage.is_remote(url) else scan_file(url)
        if url in stats and stats[url]["successes"] != found.samples:
            raise wrong_count(url, stats[url]["successes"], found.samples, stats_url(url))
        try:
            block, width = pack_starts(found.starts)
        except UserError as error:
            raise UserError(f"{url} {error}") from None
        blocks.append(block)
        widths.append(width)
        counts.append(found.samples)
    tokenizer = tokenizer_of(stats)
    name = os.path.basename(root) or root
    manifest = make_manifest(name, root, urls, lengths, counts, "manifest", tokenizer)
    content = b"".join(blocks)
    offsets = f"offsets-{xxhash.xxh64_hexdigest(content)}.bin"
    ends = np.cumsum([0, *map(len, blocks)], dtype=np.int64)
    rows = pa.table(
        {
            "path": manifest.paths,
            "count": pa.array(counts, pa.int64()),
            "size": pa.array(manifest.sizes, pa.int64()),
            "width": pa.array(widths, pa.uint8()),
            "block": pa.array(ends[:-1], pa.int64()),
        },
        metadata={"dromos_index": FORMAT, "offsets": offsets, "tokenizer": tokenizer or ""},
    )
    folder = storage.join(root, INDEX_FOLDER)
    storage.publish(storage.join(folder, offsets), content)
    storage.publish_table(storage.join(folder, "shards.parquet"), rows)
    _remove_old(folder, keep=offsets)
    return open_source(name, path)


def _remove_old(folder: str, keep: str) -> None:
    """Offsets of an earlier index; a reader that has them mapped keeps them."""
    if not storage.is_remote(folder):
        for name in os.listdir(folder):
            if re.fullmatch(OFFSETS, name) and name != keep:
                os.unlink(os.path.join(folder, name))
