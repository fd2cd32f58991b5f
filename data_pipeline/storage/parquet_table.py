"""Small parquet tables of the index, read without what pyarrow would load besides: pandas takes half a second."""

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
    """The table and its metadata. Raises ValueError, in one line, for what is no parquet; OSError if it cannot be
    read."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    data = storage.read_bytes(url)
    try:
        # parquet.read_table would import pyarrow.dataset, and with it pandas. Without threads of Arrow's none can be
        # in the way when the process ends: under load that was seen to abort it.
        table = parquet.ParquetFile(io.BytesIO(data), pre_buffer=False).read(use_threads=False)
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    return table, metadata


def column(table: pa.Table, name: str) -> np.ndarray:
    """A column of numbers. Raises KeyError if it is not there, ValueError if it holds others or nulls."""
    # Array.to_numpy would import pandas too.
    try:
        parts = [np.from_dlpack(chunk) for chunk in table[name].chunks if len(chunk)]
    except (BufferError, TypeError) as error:
        raise ValueError(f"column {name}: {error}") from None
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def texts(table: pa.Table, name: str) -> list[str]:
    """A column of texts. Raises KeyError if it is not there, ValueError if it holds others or nulls."""
    found: list[str] = table[name].to_pylist()
    if not all(isinstance(one, str) for one in found):
        raise ValueError(f"column {name} is of type {table[name].type}, with {table[name].null_count} nulls")
    return found


def digest(table: pa.Table, columns: Sequence[str], *more: str) -> str:
    """16 hex digits over the shards' paths, columns of numbers, and other texts."""
    state = xxhash.xxh64("\0".join([*texts(table, "path"), *more]).encode("utf-8", "surrogateescape"))
    for name in columns:
        state.update(column(table, name).tobytes())
    return state.hexdigest()
