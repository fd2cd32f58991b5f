"""What a source is: its shards and how many samples each holds, by an index, statistics or the tars."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash

from data_pipeline import storage
from data_pipeline.errors import ReadError, UserError
from data_pipeline.sources import sidecars
from data_pipeline.sources.offset_file import OffsetFile
from data_pipeline.sources.scan import locate
from data_pipeline.sources.views import View, open_view
from data_pipeline.storage.parquet_table import column, digest, read_table

if TYPE_CHECKING:
    import pyarrow as pa

CountedBy = Literal["manifest", "stats", "sidecar", "tar"]
INDEX_FOLDER = "_index"
FORMAT = "3"
OFFSETS = r"offsets-[0-9a-f]{16}\.bin"
PREPARE_HINT = (
    "`dromos data prepare RECIPE` makes the data of a recipe that says how "
    "(the demo's: dromos data prepare configs/demo/flip.yaml); else correct the path"
)


@dataclass(frozen=True, eq=False)
class Manifest:
    """A source opened: counts alone fix the order, so nothing else has to be known before training.

    paths: of the shards below the root; counts: int64 [shards], samples; sizes: int64 [shards], bytes
    fingerprint: covers paths, counts, sizes, the tokenizer of packed text and the view; it is the same whoever
    counted and wherever the root lies
    offsets: where the index keeps the samples' places, None without an index
    versions: uint64 [shards], of the content as the object store names it; None for files
    view, kept: the view's name and its bitmap, where only some of the samples are used; `counts` are of these
    """

    name: str
    root: str
    paths: list[str]
    counts: np.ndarray
    sizes: np.ndarray
    counted_by: CountedBy
    fingerprint: str
    tokenizer: str | None = None
    view: str | None = None
    offsets: OffsetFile | None = None
    kept: View | None = None
    versions: np.ndarray | None = None

    @property
    def samples(self) -> int:
        return int(self.counts.sum())

    @property
    def tar_counts(self) -> np.ndarray:
        """int64 [shards]: samples in each tar, also those that a view leaves out."""
        return self.counts if self.kept is None else self.kept.tar_counts

    def url(self, shard: int) -> str:
        return storage.join(self.root, self.paths[shard])

    def in_tar(self, shards: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """int64: positions in their tars of the `indices`-th samples of `shards`; the two broadcast."""
        if self.kept is not None:
            return self.kept.in_tar(shards, indices)
        return np.broadcast_arrays(np.asarray(shards, np.int64), np.asarray(indices, np.int64))[1]

    def position(self, shard: int, index: int) -> int:
        """`in_tar` of one sample."""
        return index if self.kept is None else int(self.kept.in_tar(np.array([shard]), np.array([index]))[0])

    def seen_through(self, view: str) -> Manifest:
        """The source as this view of it, which trains on the samples it keeps and on no others."""
        kept, counts = open_view(view, self.root, self.paths, self.counts, self.sizes)
        if not counts.sum():
            raise UserError(
                f"view {view!r} keeps no sample of these shards; make it again with another filter"
            )
        printed = xxhash.xxh64_hexdigest(f"{self.fingerprint} {kept.digest}".encode())
        return replace(self, counts=counts, fingerprint=printed, view=view, kept=kept)


def fingerprint(paths: Sequence[str], counts: np.ndarray, sizes: np.ndarray, tokenizer: str | None) -> str:
    """16 hex digits over everything that decides which samples a source has, in which order."""
    rows = zip(paths, counts.tolist(), sizes.tolist(), strict=True)
    text = "".join(f"{path}\0{count}\0{size}\n" for path, count, size in rows)
    return xxhash.xxh64_hexdigest(
        text.encode("utf-8", "surrogateescape") + f"tokenizer\0{tokenizer or ''}".encode()
    )


def open_source(name: str, path: str, view: str | None = None) -> Manifest:
    """Shards and counts of a folder, a brace pattern or one tar; with `view`, of what that keeps.

    Counts come from the index if there is one, else from img2dataset's `SHARD_stats.json` ("successes"), else from
    what other tools wrote beside the tars, else from the headers of the tars.

    Raises UserError, naming the source and the path, if there is nothing there, a shard is missing, or the index or
    view is older than the shards; ReadError if the disk or the store does not answer.
    """
    try:
        try:
            manifest = _open(name, path)
        except UserError as error:
            raise UserError(
                f"{error}; {PREPARE_HINT}" if "does not exist" in str(error) else str(error)
            ) from None
        return manifest if view is None else manifest.seen_through(view)
    except UserError as error:
        raise UserError(f"source {name!r}: {error}") from None
    except OSError as error:
        raise ReadError(f"source {name!r}: {path} cannot be read: {error}; run again once it can") from error


def _open(name: str, path: str) -> Manifest:
    urls = storage.list_shards(path)
    root = storage.root_of(path)
    tags: dict[str, int] = {}
    lengths = shard_lengths(urls, path, tags)
    indexed = read_index(root)
    if indexed is not None:
        manifest = _from_index(name, root, urls, lengths, *indexed)
    else:
        counts, counted_by, tokenizer = count_shards(root, urls, lengths)
        manifest = make_manifest(name, root, urls, lengths, counts, counted_by, tokenizer)
    if not tags:
        return manifest
    return replace(manifest, versions=np.array([tags.get(url, 0) for url in urls], np.uint64))


def make_manifest(
    name: str,
    root: str,
    urls: Sequence[str],
    lengths: dict[str, int],
    counts: Sequence[int] | np.ndarray,
    counted_by: CountedBy,
    tokenizer: str | None,
    offsets: OffsetFile | None = None,
) -> Manifest:
    counted, sizes = np.array(counts, np.int64), np.array([lengths[url] for url in urls], np.int64)
    if not counted.sum():
        raise UserError(f"the {len(urls)} tars in {root} hold no samples; make the data again")
    paths = paths_below(root, urls)
    printed = fingerprint(paths, counted, sizes, tokenizer)
    return Manifest(name, root, paths, counted, sizes, counted_by, printed, tokenizer, offsets=offsets)


def paths_below(root: str, urls: Sequence[str]) -> list[str]:
    """`storage.path_below` of many urls."""
    start = f"{root}/"
    plain = len(start) if root and "//" not in start and "/./" not in start else None
    return [
        url[plain:]
        if plain is not None and url.startswith(start) and "//" not in url[plain:] and "/./" not in url
        else storage.path_below(root, url)
        for url in urls
    ]


def shard_lengths(urls: Sequence[str], path: str, tags: dict[str, int] | None = None) -> dict[str, int]:
    """Bytes of every shard; UserError if one is not there. `tags` is filled as in storage.sizes."""
    lengths = storage.sizes(urls, tags)
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


def count_shards(
    root: str, urls: Sequence[str], lengths: dict[str, int]
) -> tuple[list[int], CountedBy, str | None]:
    """Counts of the shards, who counted them, or the last of them, and the tokenizer of packed text."""
    stats = read_stats(urls)
    counted = {url: one["successes"] for url, one in stats.items()}
    by: CountedBy = "stats"
    if len(counted) < len(urls):
        left = [url for url in urls if url not in counted]
        counted |= sidecars.count(root, left, lengths)
        by = "sidecar"
    if len(counted) < len(urls):
        counted |= {url: len(locate(url, url)) - 1 for url in urls if url not in counted}
        by = "tar"
    return [counted[url] for url in urls], by, tokenizer_of(stats)


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
        except (ValueError, KeyError, TypeError, RecursionError) as error:
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
    try:
        table, metadata = read_table(url)
        if metadata["dromos_index"] == FORMAT:
            if not re.fullmatch(OFFSETS, metadata["offsets"]):
                raise KeyError(metadata["offsets"])
            if metadata["digest"] != digest_of(table, metadata["tokenizer"]):
                raise KeyError("its content is not what was written")
    except (KeyError, ValueError) as error:
        raise UserError(f"{url} is no index ({error}); run: dromos data index {root}") from None
    if metadata["dromos_index"] != FORMAT:
        raise UserError(
            f"{url} has format {metadata['dromos_index']}, not {FORMAT}; run: dromos data index {root}"
        )
    return table, storage.join(storage.join(root, INDEX_FOLDER), metadata["offsets"])


def digest_of(table: pa.Table, tokenizer: str) -> str:
    """Hash of all in an index that order and places depend on."""
    return digest(table, ("count", "size", "width", "check", "block"), tokenizer)


def _from_index(
    name: str, root: str, urls: Sequence[str], lengths: dict[str, int], table: pa.Table, offsets: str
) -> Manifest:
    again = f"run: dromos data index {root}"
    known = table["path"].to_pylist()
    paths = paths_below(root, urls)
    rows: np.ndarray = np.arange(len(known))
    if paths != known:
        place = {path: row for row, path in enumerate(known)}
        rows = np.array([place.get(path, -1) for path in paths], np.int64)
        if (rows < 0).any():
            raise UserError(
                f"{urls[int(np.argmin(rows))]} is newer than the index in {root}/{INDEX_FOLDER}, which does not "
                f"know it; {again}"
            )
    counts, sizes, blocks = (column(table, key)[rows].astype(np.int64) for key in ("count", "size", "block"))
    widths, checks = column(table, "width")[rows], column(table, "check")[rows]
    changed = np.flatnonzero(sizes != np.array([lengths[url] for url in urls], np.int64))
    if len(changed):
        url = urls[int(changed[0])]
        raise UserError(f"{url} has {lengths[url]} bytes, {sizes[changed[0]]} when it was indexed; {again}")
    tokenizer = (table.schema.metadata or {}).get(b"tokenizer", b"").decode() or None
    places = OffsetFile(offsets, blocks, widths, checks)
    return make_manifest(name, root, urls, lengths, counts, "manifest", tokenizer, places)


def wrong_count(url: str, promised: int, found: int, promised_by: str) -> UserError:
    folder = url.rpartition("/")[0]
    return UserError(
        f"{url} holds {found} samples, but {promised_by} says {promised}; counts fix the order of samples: "
        f"make the shard again, or correct that file and run: dromos data index {folder}"
    )
