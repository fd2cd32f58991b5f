"""Detects the public format of a path: by file names, then by columns or fields, else by the first bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from data_pipeline import storage
from data_pipeline.errors import ContentError, UserError
from data_pipeline.storage.file_kind import COMPRESSED, describe_kind, file_kind
from data_pipeline.text_encoding import decode_line, is_utf16, without_bom

Family = Literal["tars", "pairs", "outcomes", "documents", "lines", "conversations", "prompted", "unknown"]
# The first suffix in this order that occurs in a folder decides its kind.
SUFFIXES = {
    ".tar": "tar",
    ".parquet": "parquet",
    ".tsv": "tsv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "tsv",
}
# Files beside the data: statistics, tokenizers, configurations.
NOT_DATA = ("_stats.json", "tokenizer.json", "tokenizer_config.json", "config.json", "packed.json")
TITLES = {
    "tars": "tars",
    "cc3m": "CC3M lines (caption, tab, url)",
    "open_clip": "open_clip's CSV (filepath, tab, title)",
    "refinedweb": "RefinedWeb documents",
    "fineweb": "FineWeb documents",
    "documents": "documents",
    "img2dataset": "img2dataset's table of rows",
    "llava": "LLaVA / ShareGPT conversations",
    "messages": "conversations as messages",
    "paligemma": "PaliGemma image, prefix, suffix",
    "unknown-table": "a table of no known format",
    "unknown-json": "JSON of no known format",
}
KNOWN_FORMATS = (
    "tars of webdataset or img2dataset; parquet of LAION, COYO, DataComp, RefinedWeb or FineWeb; CC3M's .tsv; "
    "open_clip's .csv, with tabs between the columns; json or jsonl of LLaVA, ShareGPT or PaliGemma"
)
# (url, text) rows whose texts have at least this mean length are web pages, else captions.
MIN_PAGE_CHARACTERS = 400


@dataclass(frozen=True)
class Format:
    """A detected format: `name` is a slug, `title` is for people, `family` selects the reader, `files` are the data."""

    name: str
    title: str
    family: Family
    files: tuple[str, ...]


def detect(path: str) -> Format:
    """The format of a file, a folder or a pattern. Raises UserError if there are no files or the format is unknown.

    A damaged file has the format that its name claims; reading it raises the error.
    """
    files, kind = _files(storage.normal(path))
    if kind == "tar":
        return Format("tars", TITLES["tars"], "tars", tuple(files))
    if kind == "parquet":
        return _table(files)
    if kind == "tsv":
        return _lines(files)
    return _json(files)


def _files(path: str) -> tuple[list[str], str]:
    """(files, kind): kind is tar, parquet, tsv or json."""
    if storage.is_pattern(path):
        files = storage.list_shards(path)
        return files, _file_kind(next(iter(storage.sizes(files)), files[0]))
    suffix = next((suffix for suffix in SUFFIXES if path.endswith(suffix)), None)
    if (suffix or os.path.isfile(storage.local_path(path))) and not os.path.isdir(storage.local_path(path)):
        return [path], _file_kind(path)
    names = _folder(path)
    for suffix, kind in SUFFIXES.items():
        chosen = [name for name in names if name.endswith(suffix) and not name.endswith(NOT_DATA)]
        if chosen:
            return chosen, kind
    # No data: listing tars raises an error that says what is there instead.
    return storage.list_shards(path), "tar"


def _folder(path: str) -> list[str]:
    try:
        return storage.list_files(path, "")
    except storage.NoFilesError:
        return []


def _file_kind(file: str) -> str:
    claimed = next((kind for suffix, kind in SUFFIXES.items() if file.endswith(suffix)), None)
    if claimed == "tar":
        return claimed
    try:
        with storage.store_errors(file), storage.open_bytes(file) as opened:
            first = opened.read(4096)
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{file} is a folder; name the files instead") from None
    kind = file_kind(first)
    if kind in COMPRESSED or kind == "zip":
        raise UserError(f"{file} is compressed with {kind}; decompress it")
    if kind in ("lfs", "html", "xml") or (kind == "parquet" and claimed not in (None, "parquet")):
        raise UserError(str(describe_kind(kind, file)))
    # A table with commas between the columns has no known format.
    found = _kind_by_bytes(first) or (None if file.endswith(".csv") else claimed)
    if found is None:
        raise UserError(f"{file} begins with {first[:16]!r}, which is not one of: {KNOWN_FORMATS}")
    return found


def _kind_by_bytes(first: bytes) -> str | None:
    if first.startswith(b"PAR1"):
        return "parquet"
    if first[257:262] == b"ustar":
        return "tar"
    if is_utf16(first):
        first = first.decode("utf-16", "ignore").encode()
    begin = without_bom(first).lstrip()
    if begin[:1] == b"{" or (begin[:1] == b"[" and begin[1:].lstrip()[:1] in (b"{", b"]", b"[")):
        return "json"
    return "tsv" if b"\t" in first.split(b"\n", 1)[0] and b"\0" not in first else None


def _lines(files: Sequence[str]) -> Format:
    from data_pipeline.formats.cc3m import header_columns
    from data_pipeline.formats.text_records import lines, open_text

    columns = None
    with open_text(files[0]) as opened:
        line = next((line for _, line in lines(opened)), None)
    if line is not None:
        with suppress(ContentError):
            columns = header_columns(decode_line(line))
    name = "open_clip" if columns is not None and columns.of_paths else "cc3m"
    return Format(name, TITLES[name], "lines", tuple(files))


def _table(files: Sequence[str]) -> Format:
    from data_pipeline.formats import img2dataset, laion, parquet, refinedweb

    names: list[str] = []
    texts: list[Any] = []
    for file in files:
        try:
            with parquet.open_file(file) as source:
                names = source.schema_arrow.names
                if {name.lower() for name in names} >= {"url", "text"} and len(names) < 5:
                    column = next(name for name in names if name.lower() == "text")
                    batch = next(source.iter_batches(batch_size=64, columns=[column]), None)
                    texts = batch.column(0).to_pylist() if batch is not None else []
            break
        except (UserError, UnicodeDecodeError):
            continue
    if img2dataset.is_output(names):
        return Format("img2dataset", TITLES["img2dataset"], "outcomes", tuple(files))
    documents = refinedweb.identify(names)
    pairs = laion.identify(names)
    if documents is None and pairs == "pairs" and _are_pages(texts):
        documents = "documents"
    if documents is not None:
        return Format(documents, TITLES[documents], "documents", tuple(files))
    if pairs is not None:
        return Format(pairs, laion.TITLES[pairs], "pairs", tuple(files))
    return Format("unknown-table", TITLES["unknown-table"], "unknown", tuple(files))


def _are_pages(texts: Sequence[Any]) -> bool:
    lengths = [len(text) for text in texts if isinstance(text, str) and text.strip()]
    return bool(lengths) and sum(lengths) >= MIN_PAGE_CHARACTERS * len(lengths)


def _json(files: Sequence[str]) -> Format:
    from data_pipeline.formats.instructions import TURNS
    from data_pipeline.formats.text_records import open_text, records

    keys: set[str] = set()
    with open_text(files[0]) as opened:
        for _, value in islice(records(files[0], opened), 20):
            if isinstance(value, dict):
                keys |= value.keys()
    for field, name in zip(TURNS, ("llava", "messages"), strict=True):
        if field in keys:
            return Format(name, TITLES[name], "conversations", tuple(files))
    if keys & {"prefix", "suffix"}:
        return Format("paligemma", TITLES["paligemma"], "prompted", tuple(files))
    return Format("unknown-json", TITLES["unknown-json"], "unknown", tuple(files))
