"""RefinedWeb (tiiuae/falcon-refinedweb): parquet files of web documents with their images' addresses."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from data_pipeline import storage
from data_pipeline.errors import ReadError, UserError

if TYPE_CHECKING:
    import pyarrow as pa

# The text is in `content`; `text` is what FineWeb and most derived sets call it.
TEXT_COLUMNS = ("content", "text")
URL_COLUMNS = ("url", "URL")


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


def list_files(path: str) -> list[str]:
    """The parquet files of a folder, sorted by name, or the one file that is named."""
    return [path] if path.endswith(".parquet") else storage.list_files(path, ".parquet")


@contextmanager
def reading(file: str) -> Iterator[BinaryIO]:
    """The parquet file opened; what pyarrow says of damaged bytes becomes a UserError that names it."""
    import pyarrow as pa

    try:
        with storage.asking(file), storage.open_bytes(file) as opened:
            yield opened
    except (pa.ArrowException, OSError) as error:
        # pyarrow also raises OSError for damage inside a column; an error of the disk has a number.
        if isinstance(error, ReadError) or getattr(error, "errno", None) is not None:
            raise
        raise UserError(f"{file} is no parquet file, or cut off ({error}); make it again") from None


def documents(path: str, rows: int = 1024) -> Iterator[tuple[str, str]]:
    """(url, text) of every row of every file, in order; a null text comes as "".

    Reads `rows` rows at a time and only the two columns. Raises UserError if a file has no text column.
    """
    import pyarrow.parquet as parquet

    for file in list_files(path):
        with reading(file) as opened:
            reader = parquet.ParquetFile(opened)
            names = reader.schema_arrow.names
            text = next((name for name in TEXT_COLUMNS if name in names), None)
            if text is None:
                raise UserError(
                    f"{file} has no column {' or '.join(TEXT_COLUMNS)}, only {', '.join(names)}; "
                    "rename the text column to content"
                )
            url = next((name for name in URL_COLUMNS if name in names), None)
            for batch in reader.iter_batches(batch_size=rows, columns=[c for c in (url, text) if c]):
                texts = batch.column(text).to_pylist()
                urls = batch.column(url).to_pylist() if url else [""] * len(texts)
                for where, content in zip(urls, texts, strict=True):
                    yield where or "", content or ""
