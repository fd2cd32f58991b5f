"""Opens parquet files, and finds columns under the many names that public files give them.

Damage becomes a UserError that names the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from data_pipeline import storage
from data_pipeline.errors import ReadError, UserError
from data_pipeline.storage.file_kind import HEAD_BYTES, describe_kind, file_kind

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as parquet


SUFFIX = ".parquet"
Kind = Literal["text", "number", "texts", "numbers", "any"]
KIND_NAMES = {
    "text": "strings",
    "number": "numbers",
    "texts": "lists of strings",
    "numbers": "lists of numbers",
    "any": "values",
}


def list_files(path: str) -> list[str]:
    """The parquet files of a folder (sorted by name) or of a pattern, or the named file itself."""
    if storage.is_pattern(path):
        return storage.list_shards(path)
    return [path] if path.endswith(SUFFIX) else storage.list_files(path, SUFFIX)


@contextmanager
def open_checked(file: str) -> Iterator[BinaryIO]:
    """Open the bytes of a parquet file; an error of pyarrow about damaged bytes becomes a UserError that names it."""
    import pyarrow as pa

    try:
        with storage.store_errors(file), storage.open_bytes(file) as opened:
            yield opened
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        # pyarrow raises OSError for damage inside a column, too; an error of the disk has an errno.
        if isinstance(error, ReadError) or getattr(error, "errno", None) is not None:
            raise
        with storage.store_errors(file), storage.open_bytes(file) as opened:
            head = opened.read(HEAD_BYTES)
        kind = file_kind(head)
        other = describe_kind(kind, file) if kind in ("lfs", "html", "xml", "empty") else None
        raise UserError(
            other or f"{file} is not a parquet file, or cut off ({error}); download or write it again"
        ) from None


@contextmanager
def open_file(file: str) -> Iterator[parquet.ParquetFile]:
    """Open a parquet file and read its footer: schema and row count."""
    import pyarrow.parquet as parquet

    with open_checked(file) as handle:
        yield parquet.ParquetFile(handle)


@dataclass(frozen=True)
class Column:
    """The meaning of a column, and its names in public files, in lower case.

    The first of these names found in the file is used.
    """

    meaning: str
    names: tuple[str, ...]
    kind: Kind
    required: bool = False


def match_columns(names: Sequence[str], columns: Sequence[Column]) -> dict[str, str]:
    """Meaning -> the file's name of the column; case is ignored."""
    spelled: dict[str, str] = {}
    for name in names:
        spelled.setdefault(name.lower(), name)
    found = {}
    for column in columns:
        named = next((spelled[alias] for alias in column.names if alias in spelled), None)
        if named is not None:
            found[column.meaning] = named
    return found


def nearest_name(expected: Sequence[str], names: Sequence[str]) -> str | None:
    """The name that is most similar to one of `expected`; None if none is similar."""
    import difflib

    spelled = {name.lower(): name for name in names}
    scored = [
        (difflib.SequenceMatcher(None, alias, lower).ratio(), -i, name)
        for i, (lower, name) in enumerate(spelled.items())
        for alias in expected
    ]
    best = max(scored, default=(0.0, 0, ""))
    return best[2] if best[0] >= 0.6 else None


def missing_columns(names: Sequence[str], columns: Sequence[Column]) -> list[str]:
    """A sentence per required column that the file does not have, with the most similar name that it has."""
    found = match_columns(names, columns)
    sentences = []
    for column in columns:
        if not column.required or column.meaning in found:
            continue
        near = nearest_name(column.names, [name for name in names if name not in found.values()])
        hint = (
            f"perhaps {near!r} is the {column.meaning}; rename it"
            if near
            else f"rename the {column.meaning} column"
        )
        sentences.append(
            f"no column {' or '.join(column.names)}, only {', '.join(names)}; {hint} to {column.names[0]}"
        )
    return sentences


def type_problems(schema: pa.Schema, columns: Sequence[Column]) -> dict[str, str]:
    """Meaning -> a sentence, for each column whose type does not fit the format."""
    found = match_columns(schema.names, columns)
    kinds = {column.meaning: column.kind for column in columns}
    sentences = {}
    for meaning, name in found.items():
        # Not field(name): it raises if two columns have that name.
        kind = schema.field(schema.names.index(name)).type
        if not type_fits(kind, kinds[meaning]):
            sentences[meaning] = (
                f"column {name} has type {kind}, the {meaning} should be {KIND_NAMES[kinds[meaning]]}"
            )
    return sentences


def type_fits(found: pa.DataType, kind: Kind) -> bool:
    """True if values of the Arrow type can be of `kind`; a column of nulls only fits every kind."""
    import pyarrow as pa

    types = pa.types
    if kind == "any" or types.is_null(found):
        return True
    if types.is_dictionary(found):
        return type_fits(found.value_type, kind)
    if kind in ("texts", "numbers"):
        inner: Kind = "text" if kind == "texts" else "number"
        return (types.is_list(found) or types.is_large_list(found)) and type_fits(found.value_type, inner)
    if kind == "text":
        return types.is_string(found) or types.is_large_string(found) or str(found) == "string_view"
    return types.is_integer(found) or types.is_floating(found) or types.is_decimal(found)


def python_values(column: Any) -> list[Any]:
    """The Python values of an Arrow array; a string that is not UTF-8 is returned as bytes."""
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
