"""Parquet files, opened so that damage becomes a UserError that names the file, and read some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from data_pipeline import storage
from data_pipeline.errors import ReadError, UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as parquet

SUFFIX = ".parquet"


def list_files(path: str) -> list[str]:
    """The parquet files of a folder, sorted by name, those a pattern spells, or the one file that is named."""
    if storage.is_pattern(path):
        return storage.list_shards(path)
    return [path] if path.endswith(SUFFIX) else storage.list_files(path, SUFFIX)


@contextmanager
def reading(file: str) -> Iterator[BinaryIO]:
    """The parquet file opened; what pyarrow says of damaged bytes becomes a UserError that names it."""
    import pyarrow as pa

    try:
        with storage.asking(file), storage.open_bytes(file) as opened:
            yield opened
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        # pyarrow also raises OSError for damage inside a column; an error of the disk has a number.
        if isinstance(error, ReadError) or getattr(error, "errno", None) is not None:
            raise
        raise UserError(f"{file} is no parquet file, or cut off ({error}); make it again") from None


@contextmanager
def opened(file: str) -> Iterator[parquet.ParquetFile]:
    """The file with its schema and row count read."""
    import pyarrow.parquet as parquet

    with reading(file) as handle:
        yield parquet.ParquetFile(handle)


def batches(file: str, columns: Sequence[str], rows: int = 1024) -> Iterator[pa.RecordBatch]:
    """Record batches of at most `rows` rows with the columns named; memory does not grow with the file's rows."""
    with opened(file) as source:
        yield from source.iter_batches(batch_size=rows, columns=list(columns))
