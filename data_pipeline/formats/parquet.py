"""Parquet files, opened so that damage becomes a UserError that names the file, and read some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from data_pipeline import storage
from data_pipeline.errors import ReadError, UserError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as parquet


SUFFIX = ".parquet"
Kind = Literal["text", "number", "texts", "numbers", "any"]
WANTED = {
    "text": "strings",
    "number": "numbers",
    "texts": "lists of strings",
    "numbers": "lists of numbers",
    "any": "values",
}


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
        with storage.store_errors(file), storage.open_bytes(file) as opened:
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


@dataclass(frozen=True)
class Column:
    """What a column means and what it is called, in lower case; the first name that is there is taken."""

    meaning: str
    names: tuple[str, ...]
    kind: Kind
    required: bool = False


def match(names: Sequence[str], columns: Sequence[Column]) -> dict[str, str]:
    """Meaning -> name as the file spells it; upper and lower case are the same."""
    spelled: dict[str, str] = {}
    for name in names:
        spelled.setdefault(name.lower(), name)
    found = {}
    for column in columns:
        named = next((spelled[alias] for alias in column.names if alias in spelled), None)
        if named is not None:
            found[column.meaning] = named
    return found


def nearest(wanted: Sequence[str], names: Sequence[str]) -> str | None:
    """The name that was probably meant to be one of `wanted`."""
    import difflib

    spelled = {name.lower(): name for name in names}
    scored = [
        (difflib.SequenceMatcher(None, alias, lower).ratio(), -i, name)
        for i, (lower, name) in enumerate(spelled.items())
        for alias in wanted
    ]
    best = max(scored, default=(0.0, 0, ""))
    return best[2] if best[0] >= 0.6 else None


def missing(names: Sequence[str], columns: Sequence[Column]) -> list[str]:
    """A sentence for every required column that is not there, with the nearest name that is."""
    found = match(names, columns)
    sentences = []
    for column in columns:
        if not column.required or column.meaning in found:
            continue
        near = nearest(column.names, [name for name in names if name not in found.values()])
        hint = (
            f"is {near!r} the {column.meaning}? Rename it" if near else f"rename the {column.meaning} column"
        )
        sentences.append(
            f"no column {' or '.join(column.names)}, only {', '.join(names)}; {hint} to {column.names[0]}"
        )
    return sentences


def wrong_types(schema: pa.Schema, columns: Sequence[Column]) -> dict[str, str]:
    """Meaning -> a sentence, for columns whose values are of another kind than the format's."""
    found = match(schema.names, columns)
    kinds = {column.meaning: column.kind for column in columns}
    sentences = {}
    for meaning, name in found.items():
        # A file may have two columns of one name; `field(name)` would refuse.
        kind = schema.field(schema.names.index(name)).type
        if not fits(kind, kinds[meaning]):
            sentences[meaning] = (
                f"column {name} holds {kind}, the {meaning} should be {WANTED[kinds[meaning]]}"
            )
    return sentences


def fits(found: pa.DataType, kind: Kind) -> bool:
    """Whether values of the Arrow type can be what `kind` says; a column of nothing but null can be anything."""
    import pyarrow as pa

    types = pa.types
    if kind == "any" or types.is_null(found):
        return True
    if types.is_dictionary(found):
        return fits(found.value_type, kind)
    if kind in ("texts", "numbers"):
        inner: Kind = "text" if kind == "texts" else "number"
        return (types.is_list(found) or types.is_large_list(found)) and fits(found.value_type, inner)
    if kind == "text":
        return types.is_string(found) or types.is_large_string(found) or str(found) == "string_view"
    return types.is_integer(found) or types.is_floating(found) or types.is_decimal(found)


def values(column: Any) -> list[Any]:
    """The Python values of an Arrow array; a string that is not UTF-8 comes as its bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        import pyarrow as pa

    raw = column.cast(pa.large_binary()).to_pylist()
    return [None if value is None else _text(value) for value in raw]


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value
