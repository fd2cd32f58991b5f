"""RefinedWeb (tiiuae/falcon-refinedweb) and FineWeb (HuggingFaceFW/fineweb): parquet files of web documents."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.formats import parquet
from data_pipeline.formats.parquet import Column, match, missing, values, wrong_types

if TYPE_CHECKING:
    import pyarrow as pa

# The text is in `content`; `text` is what FineWeb and most derived sets call it.
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
# What FineWeb has and neither RefinedWeb nor a set of pictures does.
FINEWEB = {"token_count", "language_score", "dump"}


@dataclass(frozen=True)
class Document:
    """One web page. `image_urls`: pairs of address and alternative text."""

    content: str
    url: str = ""
    timestamp: datetime.datetime | None = None
    dump: str = ""
    segment: str = ""
    image_urls: tuple[tuple[str, str], ...] = ()


def schema() -> pa.Schema:
    """Names and types of the public files."""
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
    """`refinedweb`, `fineweb`, or `documents` for others with a text and no address; None for none of them."""
    lower = {name.lower() for name in names}
    if "content" in lower:
        return "refinedweb"
    if "text" not in lower:
        return None
    if lower & FINEWEB:
        return "fineweb"
    return None if "url" in lower else "documents"


def documents(path: str, rows: int = 1024) -> Iterator[tuple[str, str]]:
    """(url, text) of every row of every file, in order; a null text comes as "".

    Reads `rows` rows at a time and only the two columns. Raises UserError if a file has no text column, or one
    whose values are no UTF-8 strings.
    """
    for file in parquet.list_files(path):
        with parquet.opened(file) as source:
            yield from documents_of(file, source, rows)


def documents_of(file: str, source: Any, rows: int = 1024) -> Iterator[tuple[str, str]]:
    """`documents` of one opened file."""
    schema = source.schema_arrow
    wrong = missing(schema.names, COLUMNS) or [
        sentence for meaning, sentence in wrong_types(schema, COLUMNS).items() if meaning in ("text", "url")
    ]
    if wrong:
        raise UserError(f"{file} has {wrong[0]}" if wrong[0].startswith("no ") else f"{file}: {wrong[0]}")
    found = match(schema.names, COLUMNS)
    text, url = found["text"], found.get("url")
    for batch in source.iter_batches(batch_size=rows, columns=[c for c in (url, text) if c]):
        texts = values(batch.column(text))
        urls = values(batch.column(url)) if url else [""] * len(texts)
        for where, content in zip(urls, texts, strict=True):
            if isinstance(content, bytes) or isinstance(where, bytes):
                raise UserError(f"{file}: a text or address that is not UTF-8; make the file again")
            yield where or "", content or ""
