"""Captions in TSVs: CC3M's caption<TAB>url without header (CC12M swaps the columns), open_clip's filepath<TAB>title."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from data_pipeline import storage
from data_pipeline.errors import ContentError
from data_pipeline.formats.laion import Pair
from data_pipeline.formats.records import BadRecord
from data_pipeline.formats.text_records import MAX_RECORD_BYTES, lines, open_text
from data_pipeline.text_encoding import decode_line

# Users add this header row, because img2dataset needs column names.
HEADER = ("caption", "url")
# Names in a header row, in any order and beside other columns: those of img2dataset and of open_clip's --csv-img-key.
CAPTION_NAMES = {"caption", "captions", "title", "text", "alt", "alt_text"}
URL_NAMES = {"url", "image_url", "img_url"}
PATH_NAMES = {"filepath", "file_path", "file", "filename", "path", "image", "image_path", "img"}
# A URL or a path of an image.
LOCATION = re.compile(r"^\S+://\S+|\.(jpe?g|png|webp|gif|bmp)$", re.IGNORECASE)


@dataclass(frozen=True)
class Columns:
    """Columns of a line: how many, and which are the caption and the URL or path. `of_paths`: written by pandas."""

    count: int = 2
    caption: int = 0
    location: int = 1
    of_paths: bool = False


def header_columns(line: str) -> Columns | None:
    """The columns that a header row names; None if the line is no header."""
    names = [name.strip().strip('"').lower() for name in line.split("\t")]
    captions = [number for number, name in enumerate(names) if name in CAPTION_NAMES]
    locations = [number for number, name in enumerate(names) if name in URL_NAMES | PATH_NAMES]
    if len(captions) != 1 or len(locations) != 1:
        return None
    return Columns(len(names), captions[0], locations[0], names[locations[0]] in PATH_NAMES)


def read_pairs(path: str, max_bytes: int = MAX_RECORD_BYTES) -> Iterator[Pair | BadRecord]:
    """Yield a Pair or a BadRecord per line; memory does not grow with the file.

    A header row says which columns are read; without one they are CC3M's, caption and URL. Quotes have no meaning
    there: the public file quotes nothing. In open_clip's file, whose header names a path, fields are quoted as pandas
    does. Blank lines are skipped. Reasons of a BadRecord: `no tab`, `more than two columns`, `other columns than the
    header`, `not UTF-8`, `NUL in text`, `missing url`, `line too long`.
    """
    with open_text(path) as file:
        yield from pairs_of(path, file, max_bytes)


def pairs_of(path: str, file: BinaryIO, max_bytes: int = MAX_RECORD_BYTES) -> Iterator[Pair | BadRecord]:
    """`read_pairs` of an open file."""
    columns = Columns()
    has_header = False
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
        named = header_columns(text) if number == 1 else None
        if named is not None:
            columns, has_header = named, True
            continue
        cells = text.split("\t")
        if len(cells) != columns.count:
            reason = "other columns than the header" if has_header else "more than two columns"
            yield BadRecord(path, place, "no tab" if len(cells) == 1 else reason, f"{text[:80]!r}")
            continue
        caption, url = cells[columns.caption].strip(), cells[columns.location].strip()
        if columns.of_paths:
            caption, url = _unquoted(caption), _unquoted(url)
        if not url:
            yield BadRecord(path, place, "missing url", f"{caption[:80]!r}")
            continue
        yield Pair(url, (caption,) if caption else ())


def is_swapped(pairs: Iterable[Pair]) -> bool:
    """True if most pairs have URL or path and caption swapped, as CC12M's file has them."""
    found = list(pairs)
    addresses = sum(LOCATION.search(pair.url) is not None for pair in found)
    captions = sum(any(LOCATION.search(caption) for caption in pair.captions) for pair in found)
    return bool(found) and captions > len(found) // 2 > addresses


def _unquoted(cell: str) -> str:
    """A field without the quotes that the csv module and pandas put around one with a quote in it."""
    if len(cell) >= 2 and cell[0] == cell[-1] == '"':
        return cell[1:-1].replace('""', '"').strip()
    return cell


def write_pairs(path: str, pairs: Iterable[tuple[str, str]], header: bool = False) -> None:
    """Write (caption, url) lines atomically; tabs and line ends in a caption become spaces."""
    rows = [HEADER, *pairs] if header else list(pairs)
    text = "".join(f"{' '.join(caption.split())}\t{url.strip()}\n" for caption, url in rows)
    storage.publish(path, text.encode())
