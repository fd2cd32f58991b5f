"""What stands beside the tars of a source: its index, its views, and the indexes of other tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.formats.img2dataset import Outcome, Sums, odd_key, read_outcomes
from data_pipeline.show.source_report import Bad, SourceReport, share
from data_pipeline.sources.manifest import INDEX_FOLDER, Manifest
from data_pipeline.sources.offsets import Offsets, offsets_gone
from data_pipeline.sources.sidecars import INFO, SUFFIXES
from data_pipeline.sources.tar import Sample
from data_pipeline.sources.views import folder_of

REASONS = 8


def look(found: SourceReport, root: str, manifest: Manifest | None) -> None:
    """Fill in "index" (in use, unusable or none), "views" and "sidecars"; a view that is no longer one is a note."""
    about = found.about
    if manifest is not None and manifest.counted_by == "manifest":
        about["index"] = "in use" if _has_offsets(found, manifest) else "unusable"
    else:
        indexed = storage.exists(storage.join(storage.join(root, INDEX_FOLDER), "shards.parquet"))
        about["index"] = "unusable" if indexed else "none"
    about["views"] = [_view(found, name, manifest) for name in _views(root)] if manifest else []
    about["sidecars"] = _sidecars(root)


def _has_offsets(found: SourceReport, manifest: Manifest) -> bool:
    """Is the other half of the index there? A remote one is not fetched for this."""
    if manifest.offsets is None:
        return False
    try:
        if not storage.is_remote(manifest.offsets.url):
            Offsets(manifest)
        elif not storage.exists(manifest.offsets.url):
            raise offsets_gone(manifest.offsets.url)
    except UserError as error:
        found.problems.append(str(error))
        return False
    return True


def _views(root: str) -> list[str]:
    try:
        urls = storage.list_files(folder_of(root), ".parquet")
    except UserError:
        return []
    return [url.rpartition("/")[2].removesuffix(".parquet") for url in urls]


def _view(found: SourceReport, name: str, manifest: Manifest) -> dict[str, Any]:
    """Name, rule, and the samples it keeps, None if it is not one of these shards any more."""
    from data_pipeline.storage.parquet_table import read_table

    about: dict[str, Any] = {"name": name, "rule": None, "samples": None}
    try:
        about["samples"] = manifest.seen_through(name).samples
        about["rule"] = read_table(storage.join(folder_of(manifest.root), f"{name}.parquet"))[1].get("rule")
    except (UserError, ValueError) as error:
        found.notes.append(str(error))
    return about


def _sidecars(root: str) -> dict[str, int]:
    """Name or suffix -> number of files."""
    counts: dict[str, int] = {}
    for suffix in SUFFIXES:
        try:
            urls = storage.list_files(root, suffix)
        except UserError:
            continue
        # The longer suffixes come first and end in the shorter ones.
        fresh = [url for url in urls if not any(url.endswith(longer) for longer in counts)]
        if fresh:
            counts[suffix] = len(fresh)
    if storage.exists(storage.join(root, INFO)):
        counts[INFO] = 1
    return counts


def join(found: SourceReport, tables: Mapping[str, Sequence[Sample]], tabled: Mapping[str, str]) -> None:
    """Set the tars that were examined beside their parquet files; what does not agree is a problem."""
    sums, bad = Sums(), Bad()
    in_tars = 0
    for tar, table in tabled.items():
        wanted = _successes(table, sums, bad, found)
        sums.shards += wanted is not None
        if wanted is None or tar not in tables:
            continue
        keys = [sample.key for sample in tables[tar]]
        in_tars += len(keys)
        _compare(found, tar, table, wanted, keys)
    without = [tar for tar in tables if tar not in tabled]
    if without:
        found.notes.append(f"{share(len(without), len(tables))} tars examined have no parquet: {without[0]}")
    found.about["rows"] = {
        "shards": sums.shards,
        "rows": sums.rows,
        "successes": sums.successes,
        "failures": dict(sums.failures.most_common(REASONS)),
        "other_failures": sum(count for _, count in sums.failures.most_common()[REASONS:]),
        "in_tars": in_tars,
    }
    if bad.counts:
        found.problems.append(
            f"{share(sum(bad.counts.values()), sums.rows)} rows of the parquet files cannot be used: "
            + ", ".join(f"{reason} {count:,}" for reason, count in bad.counts.most_common())
        )
        found.about["bad"] = bad.examples


def _successes(table: str, sums: Sums, bad: Bad, found: SourceReport) -> set[str] | None:
    """Keys of the rows whose picture should be in the tar; None if the parquet cannot be read."""
    wanted: set[str] = set()
    try:
        for outcome in read_outcomes(table, rows=4096):
            sums.add(outcome)
            if not isinstance(outcome, Outcome):
                bad.add(outcome)
            elif outcome.succeeded:
                wanted.add(outcome.key)
    except UserError as error:
        found.problems.append(str(error))
        return None
    return wanted


def _compare(found: SourceReport, tar: str, table: str, wanted: set[str], keys: Sequence[str]) -> None:
    held = set(keys)
    lost, extra = sorted(wanted - held), sorted(held - wanted)
    if lost:
        found.problems.append(
            f"{table} calls {len(wanted):,} rows a success, {len(lost):,} of them are not in {tar}; the first is "
            f"{lost[0]}. The tar is cut off or of another run: make the shard again"
        )
    if extra:
        found.problems.append(
            f"{tar} holds {len(extra):,} samples that {table} does not call a success; the first is {extra[0]}. "
            "The two are of different runs: make the shard again"
        )
    stem = tar.rpartition("/")[2].removesuffix(".tar")
    odd = odd_key(stem, keys)
    if odd is not None:
        found.notes.append(f"{tar}: {odd}; was the tar renamed?")
