"""`Manifest`: shards, counts, sizes and fingerprint of a source, from index, statistics or tars."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash

from data_pipeline import storage
from data_pipeline.errors import ReadError, UserError
from data_pipeline.sources import sidecars
from data_pipeline.sources.left_out import LeftOut, LeftOutWarning, combined, from_json
from data_pipeline.sources.offset_file import OffsetFile
from data_pipeline.sources.scan import scan_file
from data_pipeline.sources.views import View, open_view
from data_pipeline.storage.files import PathNotFoundError
from data_pipeline.storage.parquet_table import column, digest, read_table

if TYPE_CHECKING:
    import pyarrow as pa

CountedBy = Literal["manifest", "stats", "sidecar", "tar"]
INDEX_FOLDER = "_index"
INDEX_FORMAT = "4"
OFFSETS_NAME = r"offsets-[0-9a-f]{16}\.bin"  # pattern of an offset file's name
PREPARE_HINT = (
    "correct the path; if a recipe prepares this data, run: dromos data prepare RECIPE "
    "(for the demo: dromos data prepare configs/demo/flip.yaml)"
)


class SourceError(UserError):
    """A source that cannot be opened; `reason` is the message without the source's name."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"source {name!r}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[SourceError], tuple[str, str]]:
        return SourceError, (self.name, self.reason)


@dataclass(frozen=True, eq=False)
class Manifest:
    """An opened source. The counts alone determine the order of samples, so training needs nothing else to start.

    paths: shards, relative to the root
    counts: int64 [shards], samples; with a view, only those that it keeps
    sizes: int64 [shards], bytes
    counted_by: origin of the counts
    fingerprint: hash of paths, counts, sizes, the tokenizer of packed text and the view; independent of the root and of
        the origin of the counts
    tokenizer: fingerprint of the tokenizer of packed text, None for other sources
    view, kept: name and bitmap of the view, None without a view
    offsets: offset file of the index, None without an index
    versions: uint64 [shards], content versions in an object store (see object_store.version_of); None for local files
    left_out: what the tars hold that is in no sample; empty where counts come from files of other tools
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
    left_out: LeftOut = field(default_factory=LeftOut)

    @property
    def samples(self) -> int:
        return int(self.counts.sum())

    @property
    def tar_counts(self) -> np.ndarray:
        """int64 [shards]: samples in each tar, including those that a view leaves out."""
        return self.counts if self.kept is None else self.kept.tar_counts

    def url(self, shard: int) -> str:
        return storage.join(self.root, self.paths[shard])

    def tar_positions(self, shards: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """int64: positions in their tars of the samples (shard, manifest index); the arguments broadcast."""
        if self.kept is not None:
            return self.kept.tar_positions(shards, indices)
        return np.broadcast_arrays(np.asarray(shards, np.int64), np.asarray(indices, np.int64))[1]

    def tar_position(self, shard: int, index: int) -> int:
        """`tar_positions` of one sample."""
        if self.kept is None:
            return index
        return int(self.kept.tar_positions(np.array([shard]), np.array([index]))[0])

    def with_view(self, view: str) -> Manifest:
        """The same source, restricted to the samples that the view keeps.

        Raises UserError if there is no such view, if it does not match the shards, or if it keeps no sample.
        """
        kept, counts = open_view(view, self.root, self.paths, self.counts, self.sizes)
        if not counts.sum():
            raise UserError(
                f"view {view!r} keeps no sample of these shards; build it again with another filter"
            )
        combined = xxhash.xxh64_hexdigest(f"{self.fingerprint} {kept.digest}".encode())
        return replace(self, counts=counts, fingerprint=combined, view=view, kept=kept)


def fingerprint(paths: Sequence[str], counts: np.ndarray, sizes: np.ndarray, tokenizer: str | None) -> str:
    """Hash of everything that determines the samples of a source and their order, as 16 hex digits."""
    rows = zip(paths, counts.tolist(), sizes.tolist(), strict=True)
    text = "".join(f"{path}\0{count}\0{size}\n" for path, count, size in rows)
    return xxhash.xxh64_hexdigest(
        text.encode("utf-8", "surrogateescape") + f"tokenizer\0{tokenizer or ''}".encode()
    )


def open_source(name: str, path: str, view: str | None = None) -> Manifest:
    """Open a folder, a brace pattern or one tar; with `view`, restricted to the samples that the view keeps.

    Counts come from the index if there is one, else from img2dataset's `SHARD_stats.json` ("successes"), else from
    the index files of other tools beside the tars, else from the headers of the tars.

    Warns (LeftOutWarning) about links and files that are in no sample.

    Raises SourceError if the path or a shard does not exist, or if the index or the view is older than the shards;
    ReadError if the disk or the object store fails.
    """
    try:
        try:
            manifest = _open(name, path)
        except PathNotFoundError as error:
            raise UserError(f"{error}; {PREPARE_HINT}") from None
        for sentence in manifest.left_out.sentences(f"source {name!r}").values():
            warnings.warn(sentence, LeftOutWarning, stacklevel=2)
        for sentence, _ in storage.unread_files(path).sentences(path):
            warnings.warn(f"source {name!r}: {sentence}", LeftOutWarning, stacklevel=2)
        return manifest if view is None else manifest.with_view(view)
    except UserError as error:
        raise SourceError(name, str(error)) from None
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
        left_out: dict[str, LeftOut] = {}
        counts, counted_by, tokenizer = count_shards(root, urls, lengths, left_out)
        manifest = make_manifest(name, root, urls, lengths, counts, counted_by, tokenizer)
        manifest = replace(manifest, left_out=combined(left_out))
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
    """Build a manifest; `lengths` maps shard URL -> bytes. Raises UserError if the tars hold no samples."""
    counted, sizes = np.array(counts, np.int64), np.array([lengths[url] for url in urls], np.int64)
    if not counted.sum():
        raise UserError(f"the {len(urls)} tars in {root} hold no samples; make the data again")
    paths = paths_below(root, urls)
    source_fingerprint = fingerprint(paths, counted, sizes, tokenizer)
    return Manifest(
        name, root, paths, counted, sizes, counted_by, source_fingerprint, tokenizer, offsets=offsets
    )


def paths_below(root: str, urls: Sequence[str]) -> list[str]:
    """`storage.path_below` of many URLs; cuts off the prefix where that is the same, which is much faster."""
    start = f"{root}/"
    plain = len(start) if root and "//" not in start and "/./" not in start else None
    return [
        url[plain:]
        if plain is not None and url.startswith(start) and "//" not in url[plain:] and "/./" not in url
        else storage.path_below(root, url)
        for url in urls
    ]


def shard_lengths(urls: Sequence[str], path: str, tags: dict[str, int] | None = None) -> dict[str, int]:
    """Size in bytes of every shard, by URL. Adds to `tags` as storage.sizes does.

    Raises PathNotFoundError if none of the shards exists, UserError if some are missing.
    """
    lengths = storage.sizes(urls, tags)
    missing = [url for url in urls if url not in lengths]
    if len(missing) == len(urls):
        detail = "" if len(urls) == 1 else f": none of {len(urls)} shards was found"
        raise PathNotFoundError(f"{path} does not exist{detail}")
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(urls)} shards of {path} are missing, the first is {missing[0]}; "
            "fetch them, or narrow the pattern to the existing ones"
        )
    return lengths


def count_shards(
    root: str, urls: Sequence[str], lengths: dict[str, int], left_out: dict[str, LeftOut]
) -> tuple[list[int], CountedBy, str | None]:
    """Return the counts of the shards, their origin, and the tokenizer of packed text.

    Fills `left_out` for the shards that are scanned, by path below the root.

    If the counts come from several origins, the slowest one used is returned: tar, then sidecar, then stats.
    """
    stats = read_stats(urls)
    counted = {url: shard_stats["successes"] for url, shard_stats in stats.items()}
    counted_by: CountedBy = "stats"
    if len(counted) < len(urls):
        uncounted = [url for url in urls if url not in counted]
        counted |= sidecars.count_samples(root, uncounted, lengths)
        counted_by = "sidecar"
    if len(counted) < len(urls):
        for url in urls:
            if url not in counted:
                scanned = scan_file(url, lengths[url])
                counted[url] = scanned.samples
                left_out[storage.path_below(root, url)] = scanned.left_out
        counted_by = "tar"
    return [counted[url] for url in urls], counted_by, tokenizer_of(stats)


def tokenizer_of(stats: dict[str, dict[str, Any]]) -> str | None:
    """Fingerprint of the tokenizer that packed the shards, or None. Raises UserError if the shards disagree."""
    shard_of = {str(each["tokenizer"]): url for url, each in stats.items() if each.get("tokenizer")}
    if len(shard_of) > 1:
        first, second = list(shard_of.items())[:2]
        raise UserError(
            f"shards were packed with different tokenizers: {first[1]} with {first[0]}, "
            f"{second[1]} with {second[0]}; pack all of them again with the same one"
        )
    return next(iter(shard_of), None)


def stats_url(shard: str) -> str:
    """URL of img2dataset's statistics of a shard."""
    return re.sub(r"\.tar$", "", shard) + "_stats.json"


def parquet_url(shard: str) -> str:
    """URL of the parquet file that img2dataset writes beside a tar: one row per URL that it tried to download."""
    return shard.removesuffix(".tar") + ".parquet"


def read_stats(urls: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Shard URL -> content of its `_stats.json`, for the shards that have one.

    Raises UserError if a file is not JSON or its "successes" is not a count.
    """
    contents = storage.read_many([stats_url(url) for url in urls])
    result = {}
    for url in urls:
        where = stats_url(url)
        if where not in contents:
            continue
        try:
            stats = json.loads(contents[where])
            successes = stats["successes"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{where} does not contain valid statistics ({error!r}); remove it to count the samples from the tar"
            ) from None
        if isinstance(successes, bool) or not isinstance(successes, int) or successes < 0:
            raise UserError(
                f"{where}: successes is {successes!r}, not a count; remove the file to count the samples from the tar"
            )
        result[url] = stats
    return result


def read_index(root: str) -> tuple[pa.Table, str] | None:
    """(table of shards, URL of the offset file) of a source's index; None without an index. Raises UserError."""
    url = storage.join(storage.join(root, INDEX_FOLDER), "shards.parquet")
    if not storage.exists(url):
        return None
    try:
        table, metadata = read_table(url)
        if metadata["dromos_index"] == INDEX_FORMAT:
            if not re.fullmatch(OFFSETS_NAME, metadata["offsets"]):
                raise KeyError(metadata["offsets"])
            if metadata["digest"] != digest_of(table, metadata["tokenizer"]):
                raise KeyError("its content does not match its digest")
    except (KeyError, ValueError) as error:
        raise UserError(f"{url} is not a valid index ({error}); run: dromos data index {root}") from None
    if metadata["dromos_index"] != INDEX_FORMAT:
        raise UserError(
            f"{url} has format {metadata['dromos_index']}, not {INDEX_FORMAT}; run: dromos data index {root}"
        )
    return table, storage.join(storage.join(root, INDEX_FOLDER), metadata["offsets"])


def digest_of(table: pa.Table, tokenizer: str) -> str:
    """Hash of the parts of an index that determine order and byte ranges."""
    return digest(table, ("count", "size", "width", "check", "block"), tokenizer)


def _from_index(
    name: str, root: str, urls: Sequence[str], lengths: dict[str, int], table: pa.Table, offsets: str
) -> Manifest:
    """Manifest of the shards `urls`, which may be a part of the index. Raises UserError if the index is outdated."""
    advice = f"run: dromos data index {root}"
    indexed_paths = table["path"].to_pylist()
    paths = paths_below(root, urls)
    rows: np.ndarray = np.arange(len(indexed_paths))
    if paths != indexed_paths:
        row_of = {path: row for row, path in enumerate(indexed_paths)}
        rows = np.array([row_of.get(path, -1) for path in paths], np.int64)
        if (rows < 0).any():
            raise UserError(
                f"{urls[int(np.argmin(rows))]} is not in the index {root}/{INDEX_FOLDER}: the shard was added after "
                f"indexing; {advice}"
            )
    counts, sizes, blocks = (column(table, key)[rows].astype(np.int64) for key in ("count", "size", "block"))
    widths, checks = column(table, "width")[rows], column(table, "check")[rows]
    changed = np.flatnonzero(sizes != np.array([lengths[url] for url in urls], np.int64))
    if len(changed):
        url = urls[int(changed[0])]
        raise UserError(
            f"{url} has {lengths[url]} bytes now, but had {sizes[changed[0]]} when it was indexed; {advice}"
        )
    tokenizer = (table.schema.metadata or {}).get(b"tokenizer", b"").decode() or None
    offset_file = OffsetFile(offsets, blocks, widths, checks)
    manifest = make_manifest(name, root, urls, lengths, counts, "manifest", tokenizer, offset_file)
    try:
        return replace(manifest, left_out=_left_out(table, rows))
    except (
        KeyError,
        ValueError,
        AttributeError,
    ) as error:  # a column that the digest does not cover is damaged
        where = f"{root}/{INDEX_FOLDER}/shards.parquet"
        raise UserError(f"{where} is not a valid index ({type(error).__name__}: {error}); {advice}") from None


def _left_out(table: pa.Table, rows: np.ndarray) -> LeftOut:
    """What the shards in the given rows of an index leave out. Raises KeyError, ValueError or AttributeError if the
    column is damaged.
    """
    column_of = table["left_out"]
    if column_of.unique().to_pylist() in ([], ["{}"]):
        return LeftOut()
    paths, texts = table["path"].to_pylist(), column_of.to_pylist()
    return combined({paths[row]: from_json(texts[row]) for row in rows.tolist() if texts[row] != "{}"})


def wrong_count_error(url: str, expected: int, found: int, counted_in: str) -> UserError:
    """UserError for a tar that does not hold as many samples as `counted_in` (an index or statistics file) says."""
    folder = url.rpartition("/")[0]
    return UserError(
        f"{url} holds {found} samples, but {counted_in} says {expected}; the order of samples depends on the counts: "
        f"make the shard again, or correct or remove that file, then run: dromos data index {folder}"
    )
