"""Inspects the files beside the tars of a source: index, views, sidecars, and img2dataset's parquet files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.formats.img2dataset import Outcome, OutcomeCounts, mismatched_key, read_outcomes
from data_pipeline.show.source_report import BadRecordCounts, SourceReport, format_share
from data_pipeline.sources.manifest import INDEX_FOLDER, Manifest
from data_pipeline.sources.offsets import Offsets, missing_offsets_error
from data_pipeline.sources.sample_keys import match_keys
from data_pipeline.sources.sidecars import ENERGON_INFO, INDEX_SUFFIXES
from data_pipeline.sources.tar import Sample
from data_pipeline.sources.views import views_folder

LISTED_FAILURES = 8  # failure reasons listed by name; the others are summed


def inspect_beside_tars(report: SourceReport, root: str, manifest: Manifest | None) -> None:
    """Fill in "index" ("in use", "unusable" or "none"), "views" and "sidecars". An unusable view becomes a note."""
    about = report.about
    if manifest is not None and manifest.counted_by == "manifest":
        about["index"] = "in use" if _has_offsets(report, manifest) else "unusable"
    else:
        indexed = storage.exists(storage.join(storage.join(root, INDEX_FOLDER), "shards.parquet"))
        about["index"] = "unusable" if indexed else "none"
    about["views"] = [_inspect_view(report, name, manifest) for name in _view_names(root)] if manifest else []
    about["sidecars"] = _count_sidecars(root)


def compare_with_parquet(
    report: SourceReport, tables: Mapping[str, Sequence[Sample]], parquet_files: Mapping[str, str]
) -> None:
    """Compare the keys of the examined tars with img2dataset's parquet files; differences become problems.

    `tables` maps a tar to its samples, `parquet_files` a tar to its parquet file.
    """
    sums, bad = OutcomeCounts(), BadRecordCounts()
    in_tars = 0
    packed_again: list[tuple[str, str, str]] = []
    for tar, parquet_file in parquet_files.items():
        success_keys = _read_successes(parquet_file, sums, bad, report)
        sums.shards += success_keys is not None
        if success_keys is None or tar not in tables:
            continue
        tar_keys = [sample.key for sample in tables[tar]]
        in_tars += len(tar_keys)
        prefixed = _compare_keys(report, tar, parquet_file, success_keys, tar_keys)
        if prefixed is not None:
            packed_again.append((tar, *prefixed))
    if packed_again:
        tar, key, name = packed_again[0]
        report.notes.append(
            f"{format_share(len(packed_again), len(parquet_files))} tars examined have folders before the keys of "
            f"their parquet files, such as {key} for {name} in {tar}: they were packed again. They are joined without "
            "the folders"
        )
    without = [tar for tar in tables if tar not in parquet_files]
    if without:
        report.notes.append(
            f"{format_share(len(without), len(tables))} tars examined have no parquet file; the first is {without[0]}"
        )
    report.about["rows"] = {
        "shards": sums.shards,
        "rows": sums.rows,
        "successes": sums.successes,
        "failures": dict(sums.failures.most_common(LISTED_FAILURES)),
        "other_failures": sum(count for _, count in sums.failures.most_common()[LISTED_FAILURES:]),
        "in_tars": in_tars,
    }
    if bad.counts:
        report.problems.append(
            f"{format_share(sum(bad.counts.values()), sums.rows)} rows of the parquet files are unusable: "
            + ", ".join(f"{reason} {count:,}" for reason, count in bad.counts.most_common())
        )
        report.about["bad"] = bad.examples


def _has_offsets(report: SourceReport, manifest: Manifest) -> bool:
    """True if the offset file of the index is usable. A remote offset file is not downloaded for this check."""
    if manifest.offsets is None:
        return False
    try:
        if not storage.is_remote(manifest.offsets.url):
            Offsets(manifest)
        elif not storage.exists(manifest.offsets.url):
            raise missing_offsets_error(manifest.offsets.url)
    except UserError as error:
        report.problems.append(str(error))
        return False
    return True


def _view_names(root: str) -> list[str]:
    try:
        urls = storage.list_files(views_folder(root), ".parquet")
    except UserError:
        return []
    return [url.rpartition("/")[2].removesuffix(".parquet") for url in urls]


def _inspect_view(report: SourceReport, name: str, manifest: Manifest) -> dict[str, Any]:
    """Return the view's name, rule and number of samples; None for both if it does not match these shards."""
    from data_pipeline.storage.parquet_table import read_table

    view: dict[str, Any] = {"name": name, "rule": None, "samples": None}
    try:
        view["samples"] = manifest.with_view(name).samples
        view["rule"] = read_table(storage.join(views_folder(manifest.root), f"{name}.parquet"))[1].get("rule")
    except (UserError, ValueError) as error:
        report.notes.append(str(error))
    return view


def _count_sidecars(root: str) -> dict[str, int]:
    """Return {suffix or name of an index file of another tool: number of such files}."""
    counts: dict[str, int] = {}
    for suffix in INDEX_SUFFIXES:
        try:
            urls = storage.list_files(root, suffix)
        except UserError:
            continue
        # INDEX_SUFFIXES has the longer suffixes first, and they end in the shorter ones: count each file once.
        uncounted = [url for url in urls if not any(url.endswith(longer) for longer in counts)]
        if uncounted:
            counts[suffix] = len(uncounted)
    if storage.exists(storage.join(root, ENERGON_INFO)):
        counts[ENERGON_INFO] = 1
    return counts


def _read_successes(
    parquet_file: str, sums: OutcomeCounts, bad: BadRecordCounts, report: SourceReport
) -> set[str] | None:
    """Return the keys of the rows whose image should be in the tar; None if the parquet file is unreadable."""
    keys: set[str] = set()
    try:
        for outcome in read_outcomes(parquet_file, rows=4096):
            sums.add(outcome)
            if not isinstance(outcome, Outcome):
                bad.add(outcome)
            elif outcome.succeeded:
                keys.add(outcome.key)
    except UserError as error:
        report.problems.append(str(error))
        return None
    return keys


def _compare_keys(
    report: SourceReport, tar: str, parquet_file: str, success_keys: set[str], tar_keys: Sequence[str]
) -> tuple[str, str] | None:
    """Report keys that are in one of both only. Return the first key with folders before it, and without them."""
    names = match_keys(tar_keys, success_keys)
    in_tar = set(names)
    missing, extra = sorted(success_keys - in_tar), sorted(in_tar - success_keys)
    if missing:
        report.problems.append(
            f"{parquet_file} lists {len(success_keys):,} successes, but {len(missing):,} of them are not in {tar}; "
            f"the first is {missing[0]}. The tar is cut off or from another run: download this shard again"
        )
    if extra:
        report.problems.append(
            f"{tar} holds {len(extra):,} samples that {parquet_file} does not list as a success; the first is "
            f"{extra[0]}. The two files are from different runs: download this shard again"
        )
    stem = tar.rpartition("/")[2].removesuffix(".tar")
    odd = mismatched_key(stem, names)
    if odd is not None:
        report.notes.append(f"{tar}: {odd}; perhaps the tar was renamed")
    return next(((key, name) for key, name in zip(tar_keys, names, strict=True) if key != name), None)
