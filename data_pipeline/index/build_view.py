"""`dromos data view`: applies a filter or an id list and writes the bitmap.

A filter is evaluated on img2dataset's SHARD.parquet beside each tar and joined with the tar by key. An id list is
compared with a column of that file, or with the keys of the tar.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from data_pipeline import storage
from data_pipeline.errors import ContentError, UserError
from data_pipeline.index.filter_expression import Filter, parse, resolve
from data_pipeline.index.folder import check_writable, index_lock
from data_pipeline.index.parallel import map_shards
from data_pipeline.sources.manifest import Manifest, open_source, parquet_url, stats_url, wrong_count_error
from data_pipeline.sources.sample_keys import match_keys, shorter_keys
from data_pipeline.sources.tar import open_tar, split_name
from data_pipeline.sources.tar_members import iter_members
from data_pipeline.sources.views import (
    NUMBER_COLUMNS,
    VIEW_FORMAT,
    bitmap_content,
    check_name,
    pack_bits,
    views_folder,
)
from data_pipeline.storage.parquet_table import digest, read_table
from data_pipeline.text_encoding import decode_text, is_utf16, without_bom

if TYPE_CHECKING:
    import pyarrow as pa

ID_COLUMNS = ("key", "__key__", "uid", "id")  # accepted names for the column of a parquet file of ids


@dataclass(frozen=True)
class Rule:
    """Rule of a view: keep the samples for which the filter `where` is true, or those listed in the file `ids`.

    column: column of SHARD.parquet that contains the ids; None compares them with the keys in the tars
    """

    where: str | None = None
    ids: str | None = None
    column: str | None = None

    def __post_init__(self) -> None:
        if (self.where is None) == (self.ids is None):
            raise UserError("a view needs either a filter (--where) or a list of ids (--ids)")
        if self.column is not None and self.ids is None:
            raise UserError("--column names the column that contains the ids; it needs --ids")

    def __str__(self) -> str:
        return self.where if self.where is not None else f"ids of {self.ids}"


@dataclass(frozen=True)
class ViewResult:
    """Result of a view build.

    samples, kept: of the source and of the view
    matched: rows or ids that matched the rule; absent: those of them that are in no tar
    without_row: samples without a row in SHARD.parquet
    fingerprint: of the source with the view
    """

    name: str
    samples: int
    kept: int
    matched: int
    absent: int
    without_row: int
    fingerprint: str


@dataclass(frozen=True, eq=False)
class _ShardView:
    """Result of one shard.

    count, kept: samples of the tar and of the view; bits: packed bitmap
    matched, absent, without_row: as in ViewResult
    found: positions in the id list of the ids that are in this shard, None for a filter
    """

    url: str
    count: int
    bits: bytes
    kept: int
    matched: int = 0
    absent: int = 0
    without_row: int = 0
    found: np.ndarray | None = None


def build_view(
    path: str,
    name: str,
    rule: Rule,
    jobs: int = 1,
    progress: Callable[[int, int, int, int], None] | None = None,
) -> ViewResult:
    """Read the keys of all tars, apply the rule, and write the view to `ROOT/_index/views/`, atomically.

    Raises UserError if the filter cannot be parsed or applied, a parquet file is missing, a count is wrong, or no
    sample is kept.
    """
    # 1. Check the inputs before any tar is scanned.
    check_name(name)
    ids = _check_rule(rule)
    manifest = open_source(name, path)
    check_writable(manifest.root, manifest.paths)
    urls = [manifest.url(shard) for shard in range(len(manifest.paths))]
    if rule.ids is None or rule.column is not None:
        _check_tables(urls)
    sizes = dict(zip(urls, manifest.sizes.tolist(), strict=True))
    todo = [(url, below, sizes[url], "") for url, below in zip(urls, manifest.paths, strict=True)]

    # 2. Apply the rule to each shard.
    shard_views: dict[str, _ShardView] = {}
    seen = np.zeros(0 if ids is None else len(ids), bool)
    samples = done = 0
    for number, view in enumerate(map_shards(partial(_apply_rule, rule), todo, jobs), 1):
        shard_views[view.url] = view
        samples += view.count
        done += sizes[view.url]
        if view.found is not None:
            seen[view.found] = True
        if progress is not None:
            progress(number, len(todo), samples, done)
    views = [shard_views[url] for url in urls]

    # 3. Check the totals, then write.
    for url, expected, view in zip(urls, manifest.counts.tolist(), views, strict=True):
        if view.count != expected:
            raise wrong_count_error(url, expected, view.count, stats_url(url))
    total = sum(view.kept for view in views)
    matched = len(seen) if ids is not None else sum(view.matched for view in views)
    if not total:
        raise UserError(
            f"{rule} keeps none of the {manifest.samples} samples of {path} ({matched} matched); "
            "correct the filter or the ids"
        )
    return ViewResult(
        name,
        manifest.samples,
        total,
        matched,
        absent=int((~seen).sum()) if ids is not None else sum(view.absent for view in views),
        without_row=sum(view.without_row for view in views),
        fingerprint=_write(manifest, name, rule, views),
    )


def _check_rule(rule: Rule) -> np.ndarray | None:
    """Ids of the rule, None for a filter. Raises UserError for an invalid filter or file of ids."""
    _ids.cache_clear()
    if rule.where is not None:
        parse(rule.where)
    if rule.ids is not None and not storage.exists(rule.ids):
        raise UserError(f"{rule.ids} does not exist; name a file of ids")
    return _ids(rule.ids) if rule.ids is not None else None


def _check_tables(urls: list[str]) -> None:
    """Raise UserError if a tar has no parquet file beside it."""
    tables = [parquet_url(url) for url in urls]
    existing = storage.sizes(tables)
    missing = [table for table in tables if table not in existing]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(urls)} tars have no parquet file beside them, the first is {missing[0]}; "
            "a filter needs img2dataset's SHARD.parquet, a list of keys does not"
        )


def _apply_rule(rule: Rule, url: str, _path: str, size: int, _version: str) -> _ShardView:
    """Apply the rule to one shard."""
    keys = _keys(url, size)
    if rule.ids is not None and rule.column is None:
        positions = _positions(_ids(rule.ids), keys)
        return _shard_view(url, positions >= 0, np.unique(positions[positions >= 0]))
    table = _table(parquet_url(url))
    names = resolve(table, "key").to_pylist()
    found: np.ndarray | None = None
    if rule.where is not None:
        mask = _row_mask(parse(rule.where), table, url)
    else:
        assert rule.ids is not None
        assert rule.column is not None
        values = [str(value) for value in resolve(table, rule.column).to_pylist()]
        positions = _positions(_ids(rule.ids), values)
        mask, found = (positions >= 0).tolist(), np.unique(positions[positions >= 0])
    is_match = dict(zip(names, mask, strict=True))
    matched = {key for key, match in is_match.items() if match}
    rows = match_keys(keys, is_match)
    kept = np.fromiter((is_match.get(row, False) for row in rows), bool, len(rows))
    absent = len(matched.difference(rows))
    without_row = sum(row not in is_match for row in rows)
    return _shard_view(url, kept, found, len(matched), absent, without_row)


def _row_mask(expression: Filter, table: pa.Table, url: str) -> list[bool]:
    """Rows for which the filter is true. Raises UserError that names the parquet file."""
    try:
        return expression.mask(table)
    except UserError as error:
        raise UserError(f"{parquet_url(url)}: {error}") from None


def _shard_view(
    url: str,
    kept: np.ndarray,
    found: np.ndarray | None = None,
    matched: int = 0,
    absent: int = 0,
    without_row: int = 0,
) -> _ShardView:
    return _ShardView(
        url, len(kept), pack_bits(kept).tobytes(), int(kept.sum()), matched, absent, without_row, found
    )


def _keys(url: str, size: int) -> list[str]:
    """Keys of the samples of a tar, in order."""
    keys: list[str] = []
    with open_tar(url, size) as data:
        for _, name, *_ in iter_members(data, url):
            parts = split_name(name)
            if parts is not None and (not keys or keys[-1] != parts[0]):
                keys.append(parts[0])
    return keys


def _table(url: str) -> pa.Table:
    try:
        return read_table(url)[0]
    except ValueError as error:
        raise UserError(f"{url} is not a parquet file ({error}); make it again") from None


@lru_cache(maxsize=1)
def _ids(url: str) -> np.ndarray:
    """Sorted unique ids as bytes, from a file with one id per line, a .npy file, or a column of a parquet file.

    A .npy file contains texts, or pairs of uint64 as DataComp's uids.
    """
    if url.endswith(".parquet"):
        table = _table(url)
        names = [name for name in table.column_names if name.lower() in ID_COLUMNS] or table.column_names
        if len(names) != 1:
            raise UserError(
                f"{url}: several columns may contain the ids ({', '.join(names)}); keep one column, or name it key"
            )
        listed = [str(value).encode() for value in table[names[0]].to_pylist() if value is not None]
    elif url.endswith(".npy"):
        listed = _from_array(url)
    else:
        listed = _from_lines(url)
    ids = np.unique(np.array([each for each in listed if each], dtype=np.bytes_))
    if not ids.size:
        raise UserError(f"{url} lists no ids; name a file with one id per line, a .npy or a .parquet file")
    return ids


def _from_lines(url: str) -> list[bytes]:
    """Ids of a text file, UTF-8 or UTF-16, without byte order marks; bytes, because keys of tars may be any bytes."""
    data = storage.read_bytes(url)
    if is_utf16(data[:4]):
        try:
            data = decode_text(data).encode()
        except ContentError as error:
            raise UserError(f"{url}: {error}") from None
    if b"\0" in data:
        raise UserError(f"{url} contains NUL, so it is no list of ids; name a text file with one id per line")
    return [without_bom(line).strip() for line in data.splitlines()]


def _from_array(url: str) -> list[bytes]:
    try:
        array = np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{url} is not a numpy array ({error}); save texts, without pickle") from None
    if array.dtype == np.dtype("u8,u8"):
        return [b"%016x%016x" % (int(high), int(low)) for high, low in array.reshape(-1).tolist()]
    if array.dtype.kind not in "SU":
        raise UserError(
            f"{url} is an array of {array.dtype}; ids must be texts, such as the keys in the tars"
        )
    return [text.encode() if isinstance(text, str) else text for text in array.reshape(-1).tolist()]


def _positions(ids: np.ndarray, keys: list[str]) -> np.ndarray:
    """Position of each key in the sorted ids, -1 if it is not there: int64 [keys]. See `match_keys` for folders."""
    positions = _exact_positions(ids, keys)
    unknown = [keys[number] for number in np.flatnonzero(positions < 0).tolist()]
    shorter = [name for key in unknown for name in shorter_keys(key)]
    listed = {name for name, at in zip(shorter, _exact_positions(ids, shorter), strict=True) if at >= 0}
    if not listed:
        return positions
    listed |= {key for key, at in zip(keys, positions, strict=True) if at >= 0}
    return _exact_positions(ids, match_keys(keys, listed))


def _exact_positions(ids: np.ndarray, keys: list[str]) -> np.ndarray:
    if not keys:
        return np.zeros(0, np.int64)
    encoded = np.array([key.encode("utf-8", "surrogateescape") for key in keys], dtype=np.bytes_)
    positions = np.minimum(np.searchsorted(ids, encoded), len(ids) - 1)
    return np.where(ids[positions] == encoded, positions, -1)


def _write(manifest: Manifest, name: str, rule: Rule, views: list[_ShardView]) -> str:
    """Write the bitmap, under a name that contains its hash, then the table that names it; returns the fingerprint."""
    import pyarrow as pa

    bits = np.frombuffer(b"".join(view.bits for view in views), np.uint8)
    lengths = np.array([len(view.bits) for view in views], np.int64)
    data, first_blocks = bitmap_content(bits, lengths)
    folder = views_folder(manifest.root)
    bitmap = f"{name}-{xxhash.xxh64_hexdigest(data)}.bits"
    table = pa.table(
        {
            "path": manifest.paths,
            "count": pa.array(manifest.counts.tolist(), pa.int64()),
            "size": pa.array(manifest.sizes.tolist(), pa.int64()),
            "kept": pa.array([view.kept for view in views], pa.int64()),
            "block": pa.array(first_blocks.tolist(), pa.int64()),
        },
    )
    metadata = {
        "dromos_view": VIEW_FORMAT,
        "bits": bitmap,
        "digest": digest(table, NUMBER_COLUMNS, bitmap),
        "rule": str(rule),
        "source": manifest.fingerprint,
    }
    with index_lock(folder):
        storage.publish(storage.join(folder, bitmap), data)
        storage.publish_table(
            storage.join(folder, f"{name}.parquet"), table.replace_schema_metadata(metadata)
        )
        _remove_old(folder, name, bitmap)
    return manifest.with_view(name).fingerprint


def _remove_old(folder: str, name: str, keep: str) -> None:
    """Remove bitmaps of earlier views of this name; a reader that has mapped one can still read it."""
    if not storage.is_remote(folder):
        for old in os.listdir(folder):
            if old.startswith(f"{name}-") and old.endswith(".bits") and len(old) == len(keep) and old != keep:
                os.unlink(os.path.join(folder, old))
