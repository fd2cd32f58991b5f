"""PaliGemma's jsonl: {"image", "prefix", "suffix"}, where the prefix is the prompt and the suffix is learnt."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from data_pipeline.errors import ContentError
from data_pipeline.formats.records import SURROGATE, BadRecord, check_image_path
from data_pipeline.formats.text_records import LONGEST, parsed, reading

# Coordinates y0 x0 y1 x1 in 1024 bins and masks in 128 codewords: other numbers are no tokens of the vocabulary.
PLACE = re.compile(r"<(loc|seg)(\d*)>")
BINS = {"loc": (4, 1024), "seg": (3, 128)}


@dataclass(frozen=True, slots=True)
class Prompted:
    """One example. image: path below the folder of pictures, None for text alone; suffix: None where it is to be
    generated."""

    image: str | None
    prefix: str
    suffix: str | None


def read_prompted(
    path: str, images: str | None = None, longest: int = LONGEST
) -> Iterator[tuple[str, Prompted | BadRecord]]:
    """(place, record or why it is none) of every line, in order; memory does not grow with the file.

    Verdicts beside those of `json_stream.records`: `no object`, `no prefix or suffix`, `bad text`, `not UTF-8`,
    `unsafe image path`, `missing image`, `bad location token`.
    """
    with reading(path) as file:
        yield from prompted_of(path, file, images, longest)


def prompted_of(
    path: str, file: BinaryIO, images: str | None = None, longest: int = LONGEST
) -> Iterator[tuple[str, Prompted | BadRecord]]:
    """`read_prompted` of an opened file."""
    return parsed(path, file, longest, lambda value: parse(value, images))


def parse(value: Any, images: str | None = None) -> Prompted:
    """One record. Raises ContentError, whose reasons `read_prompted` lists."""
    if not isinstance(value, dict):
        raise ContentError("no object", f"a {type(value).__name__} where an object is expected")
    if "prefix" not in value and "suffix" not in value:
        raise ContentError("no prefix or suffix", f"it has {', '.join(map(str, value))[:120]}")
    image = value.get("image")
    if image is not None:
        if not isinstance(image, str):
            raise ContentError("missing image", f"a {type(image).__name__} where a path is expected")
        image = check_image_path(image, images)
    return Prompted(image, _words(value, "prefix") or "", _words(value, "suffix"))


def _words(value: dict[str, Any], field: str) -> str | None:
    text = value.get(field)
    if text is None:
        return None
    if not isinstance(text, str):
        raise ContentError("bad text", f"{field} is {type(text).__name__}, not text")
    if SURROGATE.search(text):
        raise ContentError("not UTF-8", field)
    for kind, number in PLACE.findall(text):
        digits, bins = BINS[kind]
        if len(number) != digits or int(number) >= bins:
            raise ContentError(
                "bad location token", f"<{kind}{number}> in {field}; {bins} bins of {digits} digits"
            )
    return text
