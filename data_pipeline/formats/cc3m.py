"""Conceptual Captions: CC3M's TSV of caption<TAB>url without a header row (CC12M has the columns swapped)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import BinaryIO

from data_pipeline import storage
from data_pipeline.errors import ContentError
from data_pipeline.formats.laion import Pair
from data_pipeline.formats.records import BadRecord
from data_pipeline.formats.text_records import MAX_RECORD_BYTES, lines, open_text
from data_pipeline.text_encoding import decode_line

# Users add this header row, because img2dataset needs column names.
HEADER = ("caption", "url")


def read_pairs(path: str, max_bytes: int = MAX_RECORD_BYTES) -> Iterator[Pair | BadRecord]:
    """Yield a Pair or a BadRecord per line; memory does not grow with the file.

    Quotes have no meaning: the public file quotes nothing. Blank lines and a header "caption<TAB>url" are skipped.
    Reasons of a BadRecord: `no tab`, `more than two columns`, `not UTF-8`, `NUL in text`,
    `missing url`, `line too long`.
    """
    with open_text(path) as file:
        yield from pairs_of(path, file, max_bytes)


def pairs_of(path: str, file: BinaryIO, max_bytes: int = MAX_RECORD_BYTES) -> Iterator[Pair | BadRecord]:
    """`read_pairs` of an open file."""
    for number, line in lines(file, max_bytes):
        place = f"line {number}"
        if line is None:
            yield BadRecord(path, place, "line too long", f"over {max_bytes} bytes")
            continue
        try:
            text = decode_line(line)
        except ContentError as error:
            yield BadRecord(path, place, error.reason, error.detail)
            continue
        if not text.strip():
            continue
        columns = text.split("\t")
        if number == 1 and tuple(column.strip().lower() for column in columns) == HEADER:
            continue
        if len(columns) != 2:
            reason = "no tab" if len(columns) == 1 else "more than two columns"
            yield BadRecord(path, place, reason, f"{text[:80]!r}")
            continue
        caption, url = (column.strip() for column in columns)
        if not url:
            yield BadRecord(path, place, "missing url", f"{caption[:80]!r}")
            continue
        yield Pair(url, (caption,) if caption else ())


def is_swapped(pairs: Iterable[Pair]) -> bool:
    """True if most pairs have URL and caption swapped, as CC12M's file has them."""
    found = list(pairs)
    addresses = sum("://" in pair.url for pair in found)
    captions = sum(any("://" in caption.split(" ")[0] for caption in pair.captions) for pair in found)
    return bool(found) and captions > len(found) // 2 > addresses


def write_pairs(path: str, pairs: Iterable[tuple[str, str]], header: bool = False) -> None:
    """Write (caption, url) lines atomically; tabs and line ends in a caption become spaces."""
    rows = [HEADER, *pairs] if header else list(pairs)
    text = "".join(f"{' '.join(caption.split())}\t{url.strip()}\n" for caption, url in rows)
    storage.publish(path, text.encode())
