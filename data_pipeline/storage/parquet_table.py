"""Reads small parquet tables without loading pandas or pyarrow.dataset.

Importing pandas takes half a second, which every process that opens a source would pay.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from data_pipeline import storage

if TYPE_CHECKING:
    import pyarrow as pa


def read_table(url: str) -> tuple[pa.Table, dict[str, str]]:
    """Read a table and its schema metadata.

    Raises ValueError with a one-line message if the file is not parquet, OSError if it cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    data = storage.read_bytes(url)
    try:
        # parquet.read_table would import pyarrow.dataset, and with it pandas. No Arrow threads: under load, a thread
        # that was still running at process exit was seen to abort the process.
        table = parquet.ParquetFile(io.BytesIO(data), pre_buffer=False).read(use_threads=False)
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    return table, metadata


def column(table: pa.Table, name: str) -> np.ndarray:
    """A numeric column, [rows]. Raises KeyError if it is missing, ValueError for another type or nulls."""
    # Array.to_numpy would import pandas too.
    try:
        chunks = [np.from_dlpack(chunk) for chunk in table[name].chunks if len(chunk)]
    except (BufferError, TypeError) as error:
        raise ValueError(f"column {name}: {error}") from None
    return np.concatenate(chunks) if chunks else np.zeros(0, np.int64)


def text_column(table: pa.Table, name: str) -> list[str]:
    """A string column. Raises KeyError if it is missing, ValueError for another type or nulls."""
    values: list[str] = table[name].to_pylist()
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"column {name} is of type {table[name].type}, with {table[name].null_count} nulls")
    return values


def digest(table: pa.Table, number_columns: Sequence[str], *texts: str) -> str:
    """Hash of column `path`, the texts and the numeric columns, as 16 hex digits."""
    state = xxhash.xxh64("\0".join([*text_column(table, "path"), *texts]).encode("utf-8", "surrogateescape"))
    for name in number_columns:
        state.update(column(table, name).tobytes())
    return state.hexdigest()
