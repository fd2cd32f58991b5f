"""Inspects a source of tars: shards, members, captions, and the files of img2dataset beside the tars."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.show import beside_tars
from data_pipeline.show.decoded_samples import judge_packed, judge_samples
from data_pipeline.show.members import LISTED_EXTENSIONS, read_members, summarize
from data_pipeline.show.source_report import SourceReport, evenly_spaced, format_share
from data_pipeline.sources.left_out import LeftOut, LeftOutWarning, combined
from data_pipeline.sources.manifest import (
    Manifest,
    SourceError,
    open_source,
    parquet_url,
    read_stats,
    stats_url,
    wrong_count_error,
)
from data_pipeline.sources.sample_check import lacks_caption, lacks_image
from data_pipeline.sources.sidecars import Count, read_counts
from data_pipeline.sources.tar import IMAGE_EXTENSIONS, Sample, image_member, member_table

# Examining a tar in an object store downloads all of it.
EXAMINED_REMOTE_TARS = 2


def inspect_tars(report: SourceReport, path: str, examine: int, first: int) -> None:
    """Fill in the report of a source of tars. Members are counted in `examine` tars.

    Raises UserError if none of the tars exists.
    """
    about, urls = report.about, list(report.form.files)

    # 1. Shards: which exist, and how training would open them.
    sizes = storage.sizes(urls)
    missing = [url for url in urls if url not in sizes]
    if len(missing) == len(urls):
        raise UserError(f"{path} does not exist")
    report.problems.extend(f"{url} does not exist" for url in missing)
    existing = [url for url in urls if url in sizes]
    manifest = None if missing else _open(path, report)

    # 2. Members and captions of the examined tars.
    examine = min(examine, EXAMINED_REMOTE_TARS) if storage.is_remote(path) else examine
    examined = evenly_spaced(existing, examine)
    left_out: dict[str, LeftOut] = {}
    tables = report.tables = _read_tables(path, examined, report, left_out)
    samples = [sample for table in tables.values() for sample in table]
    _report_left_out(path, report, manifest, combined(left_out), len(samples))
    members = Counter(extension for sample in samples for extension in sample.members)
    report.problems.extend(_missing_members(samples, members))
    parquet_files = {url: parquet_url(url) for url in examined if storage.exists(parquet_url(url))}
    about["kind"] = _kind(members, examined, parquet_files)
    about["format"] = about["kind"].replace(" ", "-")
    about["bytes"] = sum(sizes.values())
    about["samples"] = manifest.samples if manifest else None
    about["counted_by"] = manifest.counted_by if manifest else None
    about["fingerprint"] = manifest.fingerprint if manifest else None
    about["tokenizer"] = manifest.tokenizer if manifest else None
    about["examined"] = {"shards": len(examined), "samples": len(samples)}
    about["members"] = dict(sorted(members.most_common(LISTED_EXTENSIONS)))
    about["other_members"] = len(members) - len(about["members"])

    # 3. Content: the first samples and others, judged as in training.
    if about["kind"] == "packed text":
        judge_packed(report, tables)
    else:
        judge_samples(report, tables)

    # 4. The files beside the tars.
    beside_tars.inspect_beside_tars(report, storage.root_of(path), manifest)
    if about["kind"] == "img2dataset":
        beside_tars.compare_with_parquet(report, tables, parquet_files)
    _note_repeated_keys(report, tables)
    about["first"] = [
        summarize(sample.key, read_members(url, sample))
        for url, table in list(tables.items())[:1]
        for sample in table[:first]
    ]


def _open(path: str, report: SourceReport) -> Manifest | None:
    """Open the source as training does. Warnings become notes; an error becomes a problem, and the result is None."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", LeftOutWarning)
            manifest = open_source(path, path)
    except SourceError as error:
        report.problems.append(error.reason)
        return None
    report.notes.extend(str(warning.message) for warning in caught)
    return manifest


def _report_left_out(
    path: str, report: SourceReport, manifest: Manifest | None, examined: LeftOut, samples: int
) -> None:
    """Report what is in no sample: of all tars where the index or a scan of all headers says it, else `examined`."""
    if manifest is not None and manifest.counted_by in ("manifest", "tar"):
        examined, samples = manifest.left_out, manifest.samples
    for reason, sentence in examined.sentences(path).items():
        (report.problems if examined.is_problem(reason, samples) else report.notes).append(sentence)
    report.about["left_out"] = examined.counts
    for sentence, is_missing in storage.unread_files(path).sentences(path):
        (report.problems if is_missing else report.notes).append(sentence)


def _counts_of_others(path: str, urls: Sequence[str], report: SourceReport) -> dict[str, Count]:
    """Counts in the index files of other tools, by URL; warnings about them become notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        counts = read_counts(storage.root_of(path), urls, storage.sizes(urls))
    report.notes.extend(str(warning.message) for warning in caught)
    return counts


def _read_tables(
    path: str, urls: Sequence[str], report: SourceReport, left_out: dict[str, LeftOut]
) -> dict[str, list[Sample]]:
    """Return the samples of each readable tar, and in `left_out` what is in none.

    Unreadable tars and wrong counts become problems.
    """
    problems = report.problems
    try:
        stats = read_stats(urls)
    except UserError as error:
        problems.append(str(error))
        stats = {}
    others = _counts_of_others(path, urls, report)
    tables = {}
    for url in urls:
        try:
            left_out[url] = LeftOut()
            tables[url] = member_table(url, left_out=left_out[url])
        except UserError as error:
            # `_open` may have listed this error already, with the number of complete samples at its end.
            if not any(problem.startswith(str(error)) for problem in problems):
                problems.append(str(error))
            continue
        if url in stats and stats[url]["successes"] != len(tables[url]):
            problems.append(
                str(wrong_count_error(url, stats[url]["successes"], len(tables[url]), stats_url(url)))
            )
        if url in others and others[url].samples != len(tables[url]):
            problems.append(
                str(wrong_count_error(url, others[url].samples, len(tables[url]), others[url].where))
            )
        if stats and url not in stats:
            problems.append(
                f"{url} has no {stats_url(url).rpartition('/')[2]}, but other tars have one: "
                "perhaps the program that wrote this shard was interrupted"
            )
        if not tables[url]:
            problems.append(f"{url} holds no samples")
    return tables


def _missing_members(samples: Sequence[Sample], members: Counter[str]) -> list[str]:
    """Return a problem for each required member (image, caption, or npy of packed text) that samples lack."""
    if "npy" in members:
        lacking = [sample for sample in samples if "npy" not in sample.members]
        return [_missing_member(lacking, samples, "no npy member")] if lacking else []
    problems = []
    without_image = [sample for sample in samples if lacks_image(sample.members)]
    if without_image:
        names = "/".join(IMAGE_EXTENSIONS)
        problems.append(_missing_member(without_image, samples, f"no image member ({names})"))
    without_caption = [sample for sample in samples if lacks_caption(sample.members)]
    if without_caption:
        problems.append(_missing_member(without_caption, samples, "no member for a caption (txt or json)"))
    return problems


def _missing_member(lacking: Sequence[Sample], samples: Sequence[Sample], defect: str) -> str:
    return f"{len(lacking)} of {len(samples)} samples examined have {defect}; the first is {lacking[0].key}"


def _kind(members: Counter[str], examined: Sequence[str], parquet_files: dict[str, str]) -> str:
    if "npy" in members:
        return "packed text"
    if image_member(members) is None:
        return "tars without images"
    by_img2dataset = parquet_files and any(storage.exists(stats_url(url)) for url in examined)
    return "img2dataset" if by_img2dataset else "webdataset tars"


def _note_repeated_keys(report: SourceReport, tables: dict[str, list[Sample]]) -> None:
    """Note keys that occur twice. Two img2dataset runs in one source both number their samples from 0."""
    shard_of_key: dict[str, str] = {}
    repeated: list[tuple[str, str, str]] = []
    for url, table in tables.items():
        for sample in table:
            if sample.key in shard_of_key:
                repeated.append((sample.key, shard_of_key[sample.key], url))
            shard_of_key.setdefault(sample.key, url)
    if repeated:
        key, first_shard, second_shard = repeated[0]
        report.notes.append(
            f"{format_share(len(repeated), sum(map(len, tables.values())))} samples examined repeat a key: "
            f"{key} is in {first_shard} and in {second_shard}. Training identifies samples by shard and position, so "
            "it uses both; tools that use the key alone will confuse them"
            if first_shard != second_shard
            else f"{first_shard} holds two samples with the key {key} that are not adjacent: "
            "the members of a sample must be adjacent"
        )
