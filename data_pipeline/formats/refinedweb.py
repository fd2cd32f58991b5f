"""RefinedWeb (tiiuae/falcon-refinedweb) and FineWeb (HuggingFaceFW/fineweb): parquet files of web documents."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.formats import parquet
from data_pipeline.formats.parquet import Column, match_columns, missing_columns, python_values, type_problems

if TYPE_CHECKING:
    import pyarrow as pa

# RefinedWeb has the text in `content`, FineWeb and most derived sets in `text`.
COLUMNS = (
    Column("text", ("content", "text"), "text", required=True),
    Column("url", ("url",), "text"),
    Column("time", ("timestamp", "date"), "any"),
    Column("crawl", ("dump",), "text"),
    Column("segment", ("segment",), "any"),
    Column("images", ("image_urls",), "any"),
    Column("id", ("id",), "text"),
    Column("file", ("file_path",), "text"),
    Column("language", ("language",), "text"),
    Column("language score", ("language_score",), "number"),
    Column("tokens", ("token_count",), "number"),
)
# Columns that FineWeb has, and neither RefinedWeb nor image sets.
FINEWEB_COLUMNS = {"token_count", "language_score", "dump"}


@dataclass(frozen=True)
class Document:
    """One web page. `image_urls`: pairs of (URL, alt text)."""

    content: str
    url: str = ""
    timestamp: datetime.datetime | None = None
    dump: str = ""
    segment: str = ""
    image_urls: tuple[tuple[str, str], ...] = ()


def schema() -> pa.Schema:
    """Column names and types of the public RefinedWeb files."""
    import pyarrow as pa

    return pa.schema(
        {
            "content": pa.string(),
            "url": pa.string(),
            "timestamp": pa.timestamp("ns"),
            "dump": pa.string(),
            "segment": pa.string(),
            "image_urls": pa.list_(pa.list_(pa.string())),
        }
    )


def write_documents(path: str, documents: Sequence[Document]) -> None:
    """Write one parquet file, atomically."""
    import pyarrow as pa

    rows = [
        {
            "content": document.content,
            "url": document.url,
            "timestamp": document.timestamp,
            "dump": document.dump,
            "segment": document.segment,
            "image_urls": [list(pair) for pair in document.image_urls],
        }
        for document in documents
    ]
    storage.publish_table(path, pa.Table.from_pylist(rows, schema=schema()))


def identify(names: Sequence[str]) -> str | None:
    """`refinedweb`, `fineweb`, or `documents` for another table with a text and no URL; None for any other table."""
    lower = {name.lower() for name in names}
    if "content" in lower:
        return "refinedweb"
    if "text" not in lower:
        return None
    if lower & FINEWEB_COLUMNS:
        return "fineweb"
    return None if "url" in lower else "documents"


def documents(path: str, rows: int = 1024) -> Iterator[tuple[str, str]]:
    """Yield (url, text) of every row of every parquet file of `path`, in order; a null is "".

    Reads `rows` rows at a time and only the two columns. Raises UserError if a file has no text column or a column of
    a wrong type, or if a value is not UTF-8.
    """
    for file in parquet.list_files(path):
        with parquet.open_file(file) as source:
            yield from documents_of(file, source, rows)


def documents_of(file: str, source: Any, rows: int = 1024) -> Iterator[tuple[str, str]]:
    """`documents` of one open parquet file."""
    schema = source.schema_arrow
    absent = missing_columns(schema.names, COLUMNS)
    if absent:
        raise UserError(f"{file} has {absent[0]}")
    problems = type_problems(schema, COLUMNS)
    fatal = [sentence for meaning, sentence in problems.items() if meaning in ("text", "url")]
    if fatal:
        raise UserError(f"{file}: {fatal[0]}")
    found = match_columns(schema.names, COLUMNS)
    text, url = found["text"], found.get("url")
    for batch in source.iter_batches(batch_size=rows, columns=[c for c in (url, text) if c]):
        texts = python_values(batch.column(text))
        urls = python_values(batch.column(url)) if url else [""] * len(texts)
        for address, content in zip(urls, texts, strict=True):
            if isinstance(content, bytes) or isinstance(address, bytes):
                raise UserError(
                    f"{file}: a text or URL is not UTF-8; write the file again with valid strings"
                )
            yield address or "", content or ""
