"""Conceptual Captions (CC3M, CC12M's shape turned round): one TSV of caption<TAB>url without a header row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import BinaryIO

from data_pipeline import storage
from data_pipeline.formats.laion import Pair
from data_pipeline.formats.records import BadRecord
from data_pipeline.formats.text_records import LONGEST, lines, reading

# Users write it in front, because img2dataset needs names of columns.
HEADER = ("caption", "url")


def read_pairs(path: str, longest: int = LONGEST) -> Iterator[Pair | BadRecord]:
    """Every line of the file: a Pair, or why it is none; memory does not grow with the file.

    Quotes are letters like others: the public file quotes nothing. Verdicts: `no tab`, `more than two columns`,
    `not UTF-8`, `missing url`, `line too long`. Blank lines and a header "caption<TAB>url" are passed over.
    """
    with reading(path) as file:
        yield from pairs_of(path, file, longest)


def pairs_of(path: str, file: BinaryIO, longest: int = LONGEST) -> Iterator[Pair | BadRecord]:
    """`read_pairs` of an opened file."""
    for number, line in lines(file, longest):
        place = f"line {number}"
        if line is None:
            yield BadRecord(path, place, "line too long", f"over {longest} bytes")
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            columns = line.decode().split("\t")
        except UnicodeDecodeError as error:
            yield BadRecord(path, place, "not UTF-8", str(error))
            continue
        if number == 1 and tuple(column.strip().lower() for column in columns) == HEADER:
            continue
        if len(columns) != 2:
            reason = "no tab" if len(columns) == 1 else "more than two columns"
            yield BadRecord(path, place, reason, f"{line.decode()[:80]!r}")
            continue
        caption, url = (column.strip() for column in columns)
        if not url:
            yield BadRecord(path, place, "missing url", f"{caption[:80]!r}")
            continue
        yield Pair(url, (caption,) if caption else ())


def is_swapped(pairs: Iterable[Pair]) -> bool:
    """Whether url and caption stand in each other's place, as they do in CC12M's file."""
    found = list(pairs)
    addresses = sum("://" in pair.url for pair in found)
    captions = sum(any("://" in caption.split(" ")[0] for caption in pair.captions) for pair in found)
    return bool(found) and captions > len(found) // 2 > addresses


def write_pairs(path: str, pairs: Iterable[tuple[str, str]], header: bool = False) -> None:
    """(caption, url) lines, atomically; a tab or a line end in a caption becomes a space."""
    rows = [HEADER, *pairs] if header else list(pairs)
    text = "".join(f"{' '.join(caption.split())}\t{url.strip()}\n" for caption, url in rows)
    storage.publish(path, text.encode())
