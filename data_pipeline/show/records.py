"""Inspects sources that are read record by record: tables of image URLs, documents, lines, conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, BinaryIO

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.formats import (
    cc3m,
    img2dataset,
    instructions,
    laion,
    paligemma,
    parquet,
    refinedweb,
)
from data_pipeline.formats.parquet import Column, match_columns, nearest_name, type_problems
from data_pipeline.formats.records import BadRecord
from data_pipeline.formats.text_records import bytes_read, open_text
from data_pipeline.show.source_report import BadRecordCounts, SourceReport, evenly_spaced, format_share
from data_pipeline.show.statistics import STATISTICS, PictureStatistics, RecordStatistics

EXAMINED_RECORDS = 5000  # in all examined files together
MIN_RECORDS_PER_FILE = 100
COUNTED_FILES = 1024  # files whose rows are counted; with more files the number of rows is estimated
# Formats gathered from the web always have some unusable records. A larger share than this is a problem.
WEB_FAMILIES = ("pairs", "outcomes", "lines")
TOLERATED_SHARE = 0.01
COLUMNS: dict[str, tuple[Column, ...]] = {
    "pairs": laion.COLUMNS,
    "outcomes": img2dataset.COLUMNS,
    "documents": refinedweb.COLUMNS,
    "unknown": (),
}
# Family -> reader of an open parquet file.
TABLE_READERS: dict[str, Callable[[str, Any], Iterator[Any]]] = {
    "pairs": laion.pairs_of,
    "outcomes": img2dataset.outcomes_of,
    "documents": refinedweb.documents_of,
}
# Family -> reader of an open text file; the last argument is the folder of the images.
TEXT_READERS: dict[str, Callable[[str, BinaryIO, str | None], Iterator[Any]]] = {
    "lines": lambda file, opened, _: cc3m.pairs_of(file, opened),
    "conversations": instructions.conversations_of,
    "prompted": paligemma.prompted_of,
}


def inspect_records(report: SourceReport, examine: int, first: int, images: str | None) -> None:
    """Fill in the report from the first records of `examine` files, and list the `first` records.

    `images` is the folder of the images that records name. Raises UserError if none of the files exists.
    """
    about, form = report.about, report.form
    sizes = storage.sizes(form.files)
    about["bytes"] = sum(sizes.values())
    missing = [file for file in form.files if file not in sizes]
    if len(missing) == len(form.files):
        raise UserError(f"{form.files[0]} does not exist")
    report.problems.extend(f"{file} does not exist" for file in missing)
    examined = evenly_spaced([file for file in form.files if file in sizes], examine)
    about["examined"] = {"shards": len(examined), "samples": 0}
    if form.family == "unknown":
        _inspect_unknown(report, sizes)
        return
    statistics = STATISTICS[form.family](report, first)
    bad = BadRecordCounts()
    if form.family in TABLE_READERS:
        _count_rows(report, sizes)
        _read_tables(report, examined, statistics, bad)
    else:
        _read_text_files(report, examined, sizes, statistics, bad, images)
    about["examined"]["samples"] = statistics.examined
    statistics.finish()
    if isinstance(statistics, PictureStatistics):
        _check_pictures_exist(report, statistics.image_paths, images)
    _report_bad_records(report, bad, statistics.examined)


def _count_rows(report: SourceReport, sizes: dict[str, int]) -> None:
    """Sum the row counts in the parquet footers; of more than COUNTED_FILES files, estimate the sum from as many.

    An unreadable file becomes a problem and leaves the sum unknown.
    """
    files = evenly_spaced(list(sizes), COUNTED_FILES)
    rows: int | None = 0
    columns: list[str] | None = None
    for file in files:
        try:
            with parquet.open_file(file) as source:
                rows = None if rows is None else rows + source.metadata.num_rows
                names = source.schema_arrow.names
        except UserError as error:
            rows = None
            report.problems.append(str(error))
            continue
        if columns is not None and names != columns:
            differing = sorted(set(names) ^ set(columns)) or names
            report.notes.append(f"{file} has other columns than the first file: {', '.join(differing)}")
        columns = columns or names
    if len(files) == len(sizes):
        report.about["samples"] = rows
        report.about["counted_by"] = "parquet"
    elif rows:
        report.about["estimated"] = round(rows * report.about["bytes"] / sum(sizes[file] for file in files))
    if rows == 0:
        report.problems.append(f"the {len(files):,} files hold no rows")


def _read_tables(
    report: SourceReport, files: list[str], statistics: RecordStatistics, bad: BadRecordCounts
) -> None:
    family, schema = report.form.family, None
    limit = _records_per_file(files)
    for file in files:
        try:
            with parquet.open_file(file) as source:
                schema = schema or source.schema_arrow
                _add_records(islice(TABLE_READERS[family](file, source), limit), statistics, bad)
        except UserError as error:
            report.problems.append(str(error))
    if schema is not None:
        _describe_columns(report, schema, statistics)


def _read_text_files(
    report: SourceReport,
    files: list[str],
    sizes: dict[str, int],
    statistics: RecordStatistics,
    bad: BadRecordCounts,
    images: str | None,
) -> None:
    """Read lines or entries. If the limit cuts off a file, estimate the number of records from the bytes read."""
    family = report.form.family
    limit = _records_per_file(files)
    read = records = 0
    complete = len(files) == len(sizes)
    for file in files:
        with open_text(file) as opened:
            added = _add_records(islice(TEXT_READERS[family](file, opened, images), limit), statistics, bad)
            read += bytes_read(opened)
            records += added
            complete = complete and added < limit
    if complete:
        report.about["samples"] = records
        report.about["counted_by"] = "records"
        if not records:
            report.problems.append(f"the {len(files):,} files hold no records")
    elif read:
        report.about["estimated"] = round(records * report.about["bytes"] / read)


def _records_per_file(files: list[str]) -> int:
    return max(EXAMINED_RECORDS // max(len(files), 1), MIN_RECORDS_PER_FILE)


def _add_records(records: Iterator[Any], statistics: RecordStatistics, bad: BadRecordCounts) -> int:
    """Add each record to the statistics or to the bad records. Return the number of records."""
    before = statistics.examined
    for record in records:
        statistics.examined += 1
        # Readers of conversations yield (place, record).
        value = record[1] if isinstance(record, tuple) and isinstance(record[1], BadRecord) else record
        if isinstance(value, BadRecord):
            bad.add(value)
        else:
            statistics.add(value)
    return statistics.examined - before


def _check_pictures_exist(report: SourceReport, paths: list[str], images: str | None) -> None:
    """Check that the images that the first records name exist."""
    root = images or report.form.files[0].rpartition("/")[0] or "."
    missing = [path for path in paths if not storage.exists(storage.join(root, path))]
    if not missing:
        return
    message = f"{format_share(len(missing), len(paths))} images checked are not in {root}; the first is {missing[0]}"
    if images is None and len(missing) == len(paths):
        report.notes.append(f"{message}. Give their folder with --images")
    else:
        report.problems.append(message)


def _describe_columns(report: SourceReport, schema: Any, statistics: RecordStatistics) -> None:
    columns = COLUMNS[report.form.family]
    meanings = {name: meaning for meaning, name in match_columns(schema.names, columns).items()}
    report.about["columns"] = [
        {
            "name": field.name,
            "type": str(field.type),
            "meaning": meanings.get(field.name),
            "missing": statistics.missing_share(meanings.get(field.name)),
        }
        for field in schema
    ]
    report.problems.extend(type_problems(schema, columns).values())


def _report_bad_records(report: SourceReport, bad: BadRecordCounts, examined: int) -> None:
    if not bad.counts:
        return
    total = sum(bad.counts.values())
    listed = ", ".join(f"{reason} {count:,}" for reason, count in bad.counts.most_common())
    first = bad.examples[0]
    message = (
        f"{format_share(total, examined)} records examined are unusable: {listed}; the first is {first['place']} of "
        f"{first['where']}"
    )
    tolerated = report.form.family in WEB_FAMILIES and total <= TOLERATED_SHARE * examined
    (report.notes if tolerated else report.problems).append(message)
    report.about["verdicts"] = dict(bad.counts.most_common())
    report.about["bad"] = bad.examples


def _inspect_unknown(report: SourceReport, sizes: dict[str, int]) -> None:
    """Report why the files have no known format: their columns or fields, and the nearest expected names."""
    files = list(sizes)
    if report.form.name == "unknown-json":
        keys = _json_keys(files[0])
        expected = (*instructions.TURNS, "prefix", "suffix")
        near = nearest_name(expected, keys)
        hint = (
            f"perhaps {near!r} is one of them." if near else f"their fields are: {', '.join(keys) or 'none'}."
        )
        report.problems.append(
            f"{files[0]}: no entry has any of the fields {', '.join(expected)}; {hint} Use the format of LLaVA "
            "(conversations), of messages, or of PaliGemma (image, prefix, suffix)"
        )
        return
    _count_rows(report, sizes)
    for file in files:
        try:
            with parquet.open_file(file) as source:
                schema = source.schema_arrow
        except UserError:
            continue
        reasons = laion.missing_pair_columns(schema.names)
        report.problems.append(
            f"{file} is not a table of a known format: for images, {'; '.join(reasons)}; for documents, it has no "
            "column content or text"
        )
        report.about["columns"] = [
            {"name": field.name, "type": str(field.type), "meaning": None, "missing": None}
            for field in schema
        ]
        return


def _json_keys(file: str) -> list[str]:
    from data_pipeline.formats.text_records import records

    with open_text(file) as opened:
        values = [value for _, value in islice(records(file, opened), 20)]
    return list(dict.fromkeys(str(key) for value in values if isinstance(value, dict) for key in value))
