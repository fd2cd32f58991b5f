"""Sources that are read record by record: tables of pictures, documents, lines, conversations."""

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
from data_pipeline.formats.parquet import Column, match, nearest, wrong_types
from data_pipeline.formats.records import BadRecord
from data_pipeline.formats.text_records import reading
from data_pipeline.show.source_report import Bad, SourceReport, share, spread
from data_pipeline.show.statistics import TALLIES, RecordStatistics, WithPictures

RECORDS = 5000  # examined in all files together
COUNTED = 1024  # files whose rows are counted; of more than these the number is estimated
# Tables and lines gathered from the web have rows that are nothing; beyond this share something else is wrong.
TOLERATED = 0.01
COLUMNS: dict[str, tuple[Column, ...]] = {
    "pairs": laion.COLUMNS,
    "outcomes": img2dataset.COLUMNS,
    "documents": refinedweb.COLUMNS,
    "unknown": (),
}
TABLES: dict[str, Callable[[str, Any], Iterator[Any]]] = {
    "pairs": laion.pairs_of,
    "outcomes": img2dataset.outcomes_of,
    "documents": refinedweb.documents_of,
}
FILES: dict[str, Callable[[str, BinaryIO, str | None], Iterator[Any]]] = {
    "lines": lambda file, opened, _: cc3m.pairs_of(file, opened),
    "conversations": instructions.conversations_of,
    "prompted": paligemma.prompted_of,
}


def look(found: SourceReport, examine: int, first: int, images: str | None) -> None:
    """Fill in what the first records of `examine` files say."""
    about, form = found.about, found.form
    sizes = storage.sizes(form.files)
    about["bytes"] = sum(sizes.values())
    missing = [file for file in form.files if file not in sizes]
    if len(missing) == len(form.files):
        raise UserError(f"{form.files[0]} does not exist")
    found.problems.extend(f"{file} does not exist" for file in missing)
    chosen = spread([file for file in form.files if file in sizes], examine)
    about["examined"] = {"shards": len(chosen), "samples": 0}
    if form.family == "unknown":
        _look_at_unknown(found, sizes)
        return
    tally = TALLIES[form.family](found, first)
    bad = Bad()
    if form.family in TABLES:
        _count_rows(found, sizes)
        _look_into_tables(found, chosen, tally, bad)
    else:
        _look_into_files(found, chosen, sizes, tally, bad, images)
    about["examined"]["samples"] = tally.examined
    tally.finish()
    if isinstance(tally, WithPictures):
        _look_for_pictures(found, tally.paths, images)
    _tell_bad(found, bad, tally.examined)


def _count_rows(found: SourceReport, sizes: dict[str, int]) -> None:
    """Rows, from the end of each file, or of COUNTED of very many; a file that cannot be read is a problem and
    leaves the sum unknown."""
    files = spread(list(sizes), COUNTED)
    rows: int | None = 0
    columns: list[str] | None = None
    for file in files:
        try:
            with parquet.opened(file) as source:
                rows = None if rows is None else rows + source.metadata.num_rows
                names = source.schema_arrow.names
        except UserError as error:
            rows = None
            found.problems.append(str(error))
            continue
        if columns is not None and names != columns:
            odd = sorted(set(names) ^ set(columns)) or names
            found.notes.append(f"{file} has other columns than the first file: {', '.join(odd)}")
        columns = columns or names
    if len(files) == len(sizes):
        found.about["samples"] = rows
        found.about["counted_by"] = "parquet"
    elif rows:
        found.about["estimated"] = round(rows * found.about["bytes"] / sum(sizes[file] for file in files))
    if rows == 0:
        found.problems.append(f"the {len(files):,} files hold no rows")


def _look_into_tables(found: SourceReport, files: list[str], tally: RecordStatistics, bad: Bad) -> None:
    family, schema = found.form.family, None
    each = max(RECORDS // max(len(files), 1), 100)
    for file in files:
        try:
            with parquet.opened(file) as source:
                schema = schema or source.schema_arrow
                _take(islice(TABLES[family](file, source), each), tally, bad)
        except UserError as error:
            found.problems.append(str(error))
    if schema is not None:
        _tell_columns(found, schema, tally)


def _look_into_files(
    found: SourceReport,
    files: list[str],
    sizes: dict[str, int],
    tally: RecordStatistics,
    bad: Bad,
    images: str | None,
) -> None:
    """Lines and entries: all of small files; of large ones the first, from which the number is estimated."""
    family = found.form.family
    each = max(RECORDS // max(len(files), 1), 100)
    read = records = 0
    whole = len(files) == len(sizes)
    for file in files:
        with reading(file) as opened:
            taken = _take(islice(FILES[family](file, opened, images), each), tally, bad)
            read += opened.tell()
            records += taken
            whole = whole and taken < each
    if whole:
        found.about["samples"] = records
        found.about["counted_by"] = "records"
        if not records:
            found.problems.append(f"the {len(files):,} files hold no records")
    elif read:
        found.about["estimated"] = round(records * found.about["bytes"] / read)


def _take(records: Iterator[Any], tally: RecordStatistics, bad: Bad) -> int:
    """Counts every record, also those that are a verdict; how many there were."""
    before = tally.examined
    for record in records:
        tally.examined += 1
        value = record[1] if isinstance(record, tuple) and isinstance(record[1], BadRecord) else record
        if isinstance(value, BadRecord):
            bad.add(value)
        else:
            tally.add(value)
    return tally.examined - before


def _look_for_pictures(found: SourceReport, paths: list[str], images: str | None) -> None:
    """Whether the pictures that the first records name are there."""
    root = images or found.form.files[0].rpartition("/")[0] or "."
    absent = [path for path in paths if not storage.exists(storage.join(root, path))]
    if not absent:
        return
    sentence = (
        f"{share(len(absent), len(paths))} pictures looked for are not below {root}, the first is {absent[0]}"
    )
    if images is None and len(absent) == len(paths):
        found.notes.append(f"{sentence}; name their folder with --images")
    else:
        found.problems.append(sentence)


def _tell_columns(found: SourceReport, schema: Any, tally: RecordStatistics) -> None:
    columns = COLUMNS[found.form.family]
    meanings = {name: meaning for meaning, name in match(schema.names, columns).items()}
    found.about["columns"] = [
        {
            "name": field.name,
            "type": str(field.type),
            "meaning": meanings.get(field.name),
            "missing": tally.missing(meanings.get(field.name)),
        }
        for field in schema
    ]
    found.problems.extend(wrong_types(schema, columns).values())


def _tell_bad(found: SourceReport, bad: Bad, examined: int) -> None:
    if not bad.counts:
        return
    total = sum(bad.counts.values())
    listed = ", ".join(f"{reason} {count:,}" for reason, count in bad.counts.most_common())
    first = bad.examples[0]
    sentence = (
        f"{share(total, examined)} records examined cannot be used: {listed}; the first is {first['place']} of "
        f"{first['where']}"
    )
    gathered = found.form.family in ("pairs", "outcomes", "lines")
    within = gathered and total <= TOLERATED * examined
    (found.notes if within else found.problems).append(sentence)
    found.about["verdicts"] = dict(bad.counts.most_common())
    found.about["bad"] = bad.examples


def _look_at_unknown(found: SourceReport, sizes: dict[str, int]) -> None:
    """Why it is none of the formats: the columns or fields it has, and what they may be meant for."""
    files = list(sizes)
    if found.form.name == "unknown-json":
        keys = _keys(files[0])
        wanted = (*instructions.TURNS, "prefix", "suffix")
        near = nearest(wanted, keys)
        hint = f"is {near!r} one of them?" if near else "they have " + (", ".join(keys) or "no fields")
        found.problems.append(
            f"{files[0]}: no entry has any of {', '.join(wanted)}; {hint} Write LLaVA's conversations, messages, or "
            "PaliGemma's image, prefix and suffix"
        )
        return
    _count_rows(found, sizes)
    for file in files:
        try:
            with parquet.opened(file) as source:
                schema = source.schema_arrow
        except UserError:
            continue
        sentences = laion.lacking(schema.names)
        found.problems.append(
            f"{file} is no table of a known format: for pictures, {'; '.join(sentences)}; for documents, no column "
            "content or text"
        )
        found.about["columns"] = [
            {"name": field.name, "type": str(field.type), "meaning": None, "missing": None}
            for field in schema
        ]
        return


def _keys(file: str) -> list[str]:
    from data_pipeline.formats.text_records import records

    with reading(file) as opened:
        values = [value for _, value in islice(records(file, opened), 20)]
    return list(dict.fromkeys(str(key) for value in values if isinstance(value, dict) for key in value))
