"""`dromos data view`: which samples of a source a filter over its parquet files, or a list of ids, keeps."""

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
from data_pipeline.errors import UserError
from data_pipeline.index.filter_expression import Filter, parse, resolve
from data_pipeline.index.folder import alone, check_writable
from data_pipeline.index.parallel import walk_all
from data_pipeline.sources.manifest import Manifest, open_source, stats_url, wrong_count
from data_pipeline.sources.tar import open_tar, split_name, walk
from data_pipeline.sources.views import FORMAT, NUMBERS, check_name, folder_of, pack, ranks_of
from data_pipeline.storage.parquet_table import digest, read_table

if TYPE_CHECKING:
    import pyarrow as pa

KEYS = ("key", "__key__", "uid", "id")
"""Names that a parquet column of ids may have."""


@dataclass(frozen=True)
class Rule:
    """Which samples are kept: those that `where` holds for, or those listed in the file `ids`.

    `column` of each SHARD.parquet is what is compared with the ids; None: the keys in the tars.
    """

    where: str | None = None
    ids: str | None = None
    column: str | None = None

    def __post_init__(self) -> None:
        if (self.where is None) == (self.ids is None):
            raise UserError("a view needs either a filter (--where) or a list of ids (--ids)")
        if self.column is not None and self.ids is None:
            raise UserError("--column says what the ids are compared with; it needs --ids")

    def __str__(self) -> str:
        return self.where if self.where is not None else f"ids of {self.ids}"


@dataclass(frozen=True)
class Viewed:
    """What was made: samples kept of all; rows or ids that matched, and those of them that are in no tar; samples
    without a row."""

    name: str
    samples: int
    kept: int
    matched: int
    absent: int
    rowless: int
    fingerprint: str


@dataclass(frozen=True, eq=False)
class _Kept:
    """Of one shard. `matched`: rows that matched, absent ones as well; `found`: places of the ids that are there."""

    url: str
    count: int
    bits: bytes
    kept: int
    matched: int = 0
    absent: int = 0
    rowless: int = 0
    found: np.ndarray | None = None


def make_view(
    path: str,
    name: str,
    rule: Rule,
    jobs: int = 1,
    progress: Callable[[int, int, int, int], None] | None = None,
) -> Viewed:
    """Walk over the tars' headers for their keys, join, and write the view beside the index, atomically.

    Raises UserError: a filter that cannot be read or applied, a parquet file that is not there, counts that are
    wrong, or nothing kept.
    """
    check_name(name)
    _ids.cache_clear()
    if rule.where is not None:
        parse(rule.where)
    if rule.ids is not None and not storage.exists(rule.ids):
        raise UserError(f"{rule.ids} does not exist; name a file of ids")
    ids = _ids(rule.ids) if rule.ids is not None else None
    manifest = open_source(name, path)
    check_writable(manifest.root, manifest.paths)
    urls = [manifest.url(shard) for shard in range(len(manifest.paths))]
    if rule.ids is None or rule.column is not None:
        _check_tables(urls)
    sizes = dict(zip(urls, manifest.sizes.tolist(), strict=True))
    todo = [(url, below, sizes[url], "") for url, below in zip(urls, manifest.paths, strict=True)]
    kept: dict[str, _Kept] = {}
    seen = np.zeros(0 if ids is None else len(ids), bool)
    samples = done = 0
    for number, one in enumerate(walk_all(partial(_keep, rule), todo, jobs), 1):
        kept[one.url] = one
        samples += one.count
        done += sizes[one.url]
        if one.found is not None:
            seen[one.found] = True
        if progress is not None:
            progress(number, len(todo), samples, done)
    found = [kept[url] for url in urls]
    for url, promised, one in zip(urls, manifest.counts.tolist(), found, strict=True):
        if one.count != promised:
            raise wrong_count(url, promised, one.count, stats_url(url))
    total = sum(one.kept for one in found)
    matched = len(seen) if ids is not None else sum(one.matched for one in found)
    if not total:
        raise UserError(
            f"{rule} keeps none of the {manifest.samples} samples of {path} ({matched} matched); correct it"
        )
    return Viewed(
        name,
        manifest.samples,
        total,
        matched,
        absent=int((~seen).sum()) if ids is not None else sum(one.absent for one in found),
        rowless=sum(one.rowless for one in found),
        fingerprint=_write(manifest, name, rule, found),
    )


def _check_tables(urls: list[str]) -> None:
    tables = [_table_url(url) for url in urls]
    there = storage.sizes(tables)
    missing = [table for table in tables if table not in there]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(urls)} tars have no parquet file beside them, the first is {missing[0]}; "
            "a filter needs img2dataset's SHARD.parquet, a list of ids does not"
        )


def _table_url(url: str) -> str:
    return url.removesuffix(".tar") + ".parquet"


def _keep(rule: Rule, url: str, _path: str, size: int, _version: str) -> _Kept:
    """What the rule keeps of one shard."""
    keys = _keys(url, size)
    if rule.ids is not None and rule.column is None:
        ids = _ids(rule.ids)
        place = _places(ids, keys)
        return _packed(url, place >= 0, np.unique(place[place >= 0]))
    table = _table(_table_url(url))
    names = resolve(table, "key").to_pylist()
    found: np.ndarray | None = None
    if rule.where is not None:
        mask = _applied(parse(rule.where), table, url)
    else:
        assert rule.ids is not None
        assert rule.column is not None
        place = _places(_ids(rule.ids), [str(value) for value in resolve(table, rule.column).to_pylist()])
        mask, found = (place >= 0).tolist(), np.unique(place[place >= 0])
    rows = dict(zip(names, mask, strict=True))
    wanted = {key for key, keep in rows.items() if keep}
    kept = np.fromiter((rows.get(key, False) for key in keys), bool, len(keys))
    absent = len(wanted.difference(keys))
    rowless = sum(key not in rows for key in keys)
    return _packed(url, kept, found, len(wanted), absent, rowless)


def _applied(test: Filter, table: pa.Table, url: str) -> list[bool]:
    try:
        return test.mask(table)
    except UserError as error:
        raise UserError(f"{_table_url(url)}: {error}") from None


def _packed(
    url: str,
    kept: np.ndarray,
    found: np.ndarray | None = None,
    matched: int = 0,
    absent: int = 0,
    rowless: int = 0,
) -> _Kept:
    return _Kept(url, len(kept), pack(kept).tobytes(), int(kept.sum()), matched, absent, rowless, found)


def _keys(url: str, size: int) -> list[str]:
    """Key of each sample of a tar."""
    keys: list[str] = []
    with open_tar(url, size) as data:
        for _, name, _, _ in walk(data, url):
            parts = split_name(name)
            if parts is not None and (not keys or keys[-1] != parts[0]):
                keys.append(parts[0])
    return keys


def _table(url: str) -> pa.Table:
    try:
        return read_table(url)[0]
    except ValueError as error:
        raise UserError(f"{url} is no parquet file ({error}); make it again") from None


@lru_cache(maxsize=1)
def _ids(url: str) -> np.ndarray:
    """Sorted bytes: one id a line, a .npy of texts (or DataComp's pairs of uint64), or a column of a parquet."""
    if url.endswith(".parquet"):
        table = _table(url)
        named = [name for name in table.column_names if name.lower() in KEYS] or table.column_names
        if len(named) != 1:
            raise UserError(
                f"{url}: which of {', '.join(named)} holds the ids? Keep one column, or name it key"
            )
        listed = [str(value).encode() for value in table[named[0]].to_pylist() if value is not None]
    elif url.endswith(".npy"):
        listed = _from_array(url)
    else:
        listed = [line.strip() for line in storage.read_bytes(url).splitlines()]
    found = np.unique(np.array([one for one in listed if one], dtype=np.bytes_))
    if not found.size:
        raise UserError(f"{url} lists no ids")
    return found


def _from_array(url: str) -> list[bytes]:
    try:
        array = np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{url} is no array ({error}); save texts, without pickle") from None
    if array.dtype == np.dtype("u8,u8"):
        return [b"%016x%016x" % (int(high), int(low)) for high, low in array.reshape(-1).tolist()]
    if array.dtype.kind not in "SU":
        raise UserError(f"{url} is an array of {array.dtype}; ids are texts, keys as they stand in the tars")
    return [one.encode() if isinstance(one, str) else one for one in array.reshape(-1).tolist()]


def _places(ids: np.ndarray, keys: list[str]) -> np.ndarray:
    """Place of each key among the ids, or -1."""
    if not keys:
        return np.zeros(0, np.int64)
    wanted = np.array([key.encode("utf-8", "surrogateescape") for key in keys], dtype=np.bytes_)
    place = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    return np.where(ids[place] == wanted, place, -1)


def _write(manifest: Manifest, name: str, rule: Rule, found: list[_Kept]) -> str:
    """Bitmap first, under a name that holds its hash; then the table that names it. Returns the view's fingerprint."""
    import pyarrow as pa

    bits = np.frombuffer(b"".join(one.bits for one in found), np.uint8)
    lengths = np.array([len(one.bits) for one in found], np.int64)
    data, first = ranks_of(bits, lengths)
    folder = folder_of(manifest.root)
    bitmap = f"{name}-{xxhash.xxh64_hexdigest(data)}.bits"
    table = pa.table(
        {
            "path": manifest.paths,
            "count": pa.array(manifest.counts.tolist(), pa.int64()),
            "size": pa.array(manifest.sizes.tolist(), pa.int64()),
            "kept": pa.array([one.kept for one in found], pa.int64()),
            "block": pa.array(first.tolist(), pa.int64()),
        },
    )
    metadata = {
        "dromos_view": FORMAT,
        "bits": bitmap,
        "digest": digest(table, NUMBERS, bitmap),
        "rule": str(rule),
        "source": manifest.fingerprint,
    }
    with alone(folder):
        storage.publish(storage.join(folder, bitmap), data)
        storage.publish_table(
            storage.join(folder, f"{name}.parquet"), table.replace_schema_metadata(metadata)
        )
        _remove_old(folder, name, bitmap)
    return manifest.seen_through(name).fingerprint


def _remove_old(folder: str, name: str, keep: str) -> None:
    """Bitmaps of an earlier view of this name; a reader that has one mapped keeps it."""
    if not storage.is_remote(folder):
        for old in os.listdir(folder):
            if old.startswith(f"{name}-") and old.endswith(".bits") and len(old) == len(keep) and old != keep:
                os.unlink(os.path.join(folder, old))
