"""What a source is: its shards and how many samples each holds, by an index, statistics or the tars."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash

from data_pipeline import storage
from data_pipeline.errors import ReadError, UserError
from data_pipeline.tar import member_table

if TYPE_CHECKING:
    import pyarrow as pa

INDEX_FOLDER = "_index"
FORMAT = "1"
MEMBERS = r"members-[0-9a-f]{16}\.bin"
PREPARE_HINT = (
    "`dromos data prepare RECIPE` makes the data of a recipe that says how "
    "(the demo's: dromos data prepare configs/demo/flip.yaml); else correct the path"
)


@dataclass(frozen=True)
class Shard:
    """One tar: its path below the source's root, samples in it, bytes."""

    path: str
    count: int
    size: int


@dataclass(frozen=True)
class Manifest:
    """A source opened: counts alone fix the order, so nothing else has to be known before training.

    `fingerprint` covers paths below the root, counts, sizes and the tokenizer of packed text; it is the same
    whoever counted and wherever the root lies.
    """

    name: str
    root: str
    shards: tuple[Shard, ...]
    counted_by: Literal["manifest", "stats", "tar"]
    fingerprint: str
    tokenizer: str | None = None

    @cached_property
    def counts(self) -> np.ndarray:
        """int64 `[shards]`"""
        return np.array([shard.count for shard in self.shards], dtype=np.int64)

    @property
    def samples(self) -> int:
        return int(self.counts.sum())

    def url(self, shard: int) -> str:
        return storage.join(self.root, self.shards[shard].path)


def fingerprint(shards: Sequence[Shard], tokenizer: str | None) -> str:
    """16 hex digits over everything that decides which samples a source has, in which order."""
    state = xxhash.xxh64()
    for shard in shards:
        state.update(f"{shard.path}\0{shard.count}\0{shard.size}\n".encode("utf-8", "surrogateescape"))
    state.update(f"tokenizer\0{tokenizer or ''}".encode())
    return state.hexdigest()


def open_source(name: str, path: str) -> Manifest:
    """Shards and counts of a folder, a brace pattern or one tar.

    Counts come from the index if there is one, else from img2dataset's `SHARD_stats.json` ("successes"), else
    from the headers of the tars. Raises UserError, naming the source and the path, if there is nothing there,
    a shard is missing, or the index is older than the shards; ReadError if the disk or the store does not answer.
    """
    try:
        urls = storage.list_shards(path)
        root = storage.root_of(path)
        lengths = shard_lengths(urls, path)
        indexed = read_index(root)
        if indexed is not None:
            return _from_index(name, root, urls, lengths, *indexed)
        counts, counted_by, tokenizer = count_shards(urls)
    except UserError as error:
        hint = f"; {PREPARE_HINT}" if "does not exist" in str(error) else ""
        raise UserError(f"source {name!r}: {error}{hint}") from None
    except OSError as error:
        raise ReadError(f"source {name!r}: {path} cannot be read: {error}; run again once it can") from error
    return make_manifest(name, root, urls, lengths, counts, counted_by, tokenizer)


def make_manifest(
    name: str,
    root: str,
    urls: Sequence[str],
    lengths: dict[str, int],
    counts: Sequence[int],
    counted_by: Literal["manifest", "stats", "tar"],
    tokenizer: str | None,
) -> Manifest:
    shards = tuple(
        Shard(storage.below(root, url), count, lengths[url]) for url, count in zip(urls, counts, strict=True)
    )
    if not sum(counts):
        raise UserError(
            f"source {name!r}: the {len(urls)} tars in {root} hold no samples; make the data again"
        )
    return Manifest(name, root, shards, counted_by, fingerprint(shards, tokenizer), tokenizer)


def shard_lengths(urls: Sequence[str], path: str) -> dict[str, int]:
    """Bytes of every shard; UserError if one is not there."""
    lengths = storage.sizes(urls)
    missing = [url for url in urls if url not in lengths]
    if len(missing) == len(urls):
        raise UserError(
            f"{path} does not exist"
            if len(urls) == 1
            else f"{path} does not exist: none of {len(urls)} shards"
        )
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(urls)} shards of {path} are missing, the first is {missing[0]}; "
            "fetch them, or narrow the pattern to what is there"
        )
    return lengths


def count_shards(urls: Sequence[str]) -> tuple[list[int], Literal["stats", "tar"], str | None]:
    """Counts of the shards, who counted, and the tokenizer of packed text."""
    stats = read_stats(urls)
    counts = [stats[url]["successes"] if url in stats else len(member_table(url)) for url in urls]
    return counts, "stats" if len(stats) == len(urls) else "tar", tokenizer_of(stats)


def tokenizer_of(stats: dict[str, dict[str, Any]]) -> str | None:
    """Fingerprint of the tokenizer that packed the shards; UserError if they disagree."""
    named = {str(one["tokenizer"]): url for url, one in stats.items() if one.get("tokenizer")}
    if len(named) > 1:
        first, second = list(named.items())[:2]
        raise UserError(
            f"shards were packed with different tokenizers: {first[1]} with {first[0]}, "
            f"{second[1]} with {second[0]}; pack them all again with one"
        )
    return next(iter(named), None)


def stats_url(shard: str) -> str:
    return re.sub(r"\.tar$", "", shard) + "_stats.json"


def read_stats(urls: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Shard url -> its `_stats.json`, for the shards that have one; "successes" is checked to be a count."""
    found = storage.read_many([stats_url(url) for url in urls])
    result = {}
    for url in urls:
        where = stats_url(url)
        if where not in found:
            continue
        try:
            stats = json.loads(found[where])
            successes = stats["successes"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{where} holds no statistics ({error!r}); remove it, then the tar is counted"
            ) from None
        if isinstance(successes, bool) or not isinstance(successes, int) or successes < 0:
            raise UserError(
                f"{where}: successes is {successes!r}, not a count; remove the file, then the tar is counted"
            )
        result[url] = stats
    return result


def read_index(root: str) -> tuple[pa.Table, str] | None:
    """(shards table, url of the offsets), or None if the source was never indexed."""
    url = storage.join(storage.join(root, INDEX_FOLDER), "shards.parquet")
    if not storage.exists(url):
        return None
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        # read_table would import pyarrow.dataset, and with it pandas where that is installed.
        table = parquet.ParquetFile(io.BytesIO(storage.read_bytes(url))).read()
        metadata = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        members = metadata["members"]
        if not re.fullmatch(MEMBERS, members):
            raise KeyError(members)
    except (pa.ArrowInvalid, KeyError) as error:
        raise UserError(f"{url} is no index ({error}); run: dromos data index {root}") from None
    if metadata.get("dromos_index") != FORMAT:
        raise UserError(
            f"{url} has format {metadata.get('dromos_index')}, not {FORMAT}; run: dromos data index {root}"
        )
    return table, storage.join(storage.join(root, INDEX_FOLDER), members)


def _from_index(
    name: str, root: str, urls: Sequence[str], lengths: dict[str, int], table: pa.Table, _members: str
) -> Manifest:
    known = {row["path"]: row for row in table.to_pylist()}
    again = f"run: dromos data index {root}"
    counts = []
    for url in urls:
        row = known.get(storage.below(root, url))
        if row is None:
            raise UserError(
                f"{url} is newer than the index in {root}/{INDEX_FOLDER}, which does not know it; {again}"
            )
        if row["size"] != lengths[url]:
            raise UserError(f"{url} has {lengths[url]} bytes, {row['size']} when it was indexed; {again}")
        counts.append(row["count"])
    tokenizer = (table.schema.metadata or {}).get(b"tokenizer", b"").decode() or None
    return make_manifest(name, root, urls, lengths, counts, "manifest", tokenizer)


def wrong_count(url: str, promised: int, found: int, promised_by: str) -> UserError:
    folder = url.rpartition("/")[0]
    return UserError(
        f"{url} holds {found} samples, but {promised_by} says {promised}; counts fix the order of samples: "
        f"make the shard again, or correct that file and run: dromos data index {folder}"
    )
