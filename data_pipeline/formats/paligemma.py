"""PaliGemma's jsonl of {"image", "prefix", "suffix"}: the prefix is the prompt, the suffix is the target."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from data_pipeline.errors import ContentError
from data_pipeline.formats.records import BadRecord, check_image_path
from data_pipeline.formats.text_records import MAX_RECORD_BYTES, open_text, parse_records
from data_pipeline.text_encoding import check_text

# Boxes y0 x0 y1 x1 in 1024 bins, and masks in 128 codewords; the vocabulary has no tokens for other numbers.
LOCATION_TOKEN = re.compile(r"<(loc|seg)(\d*)>")
# Kind -> (digits, number of tokens).
BINS = {"loc": (4, 1024), "seg": (3, 128)}


@dataclass(frozen=True, slots=True)
class Prompted:
    """One example.

    image: path below the image folder, None for text alone
    suffix: the target text, None if the model is to generate it
    """

    image: str | None
    prefix: str
    suffix: str | None


def read_prompted(
    path: str, images: str | None = None, max_bytes: int = MAX_RECORD_BYTES
) -> Iterator[tuple[str, Prompted | BadRecord]]:
    """Yield (place, Prompted or BadRecord) per line, in order; memory does not grow with the file.

    Reasons of a BadRecord besides those of `text_records.records`: `no object`, `no prefix or suffix`, `bad text`,
    `not UTF-8`, `NUL in text`, `unsafe image path`, `missing image`, `bad location token`.
    """
    with open_text(path) as file:
        yield from prompted_of(path, file, images, max_bytes)


def prompted_of(
    path: str, file: BinaryIO, images: str | None = None, max_bytes: int = MAX_RECORD_BYTES
) -> Iterator[tuple[str, Prompted | BadRecord]]:
    """`read_prompted` of an open file."""
    return parse_records(path, file, max_bytes, lambda value: parse(value, images))


def parse(value: Any, images: str | None = None) -> Prompted:
    """Parse one JSON value. Raises ContentError with the reasons that `read_prompted` lists."""
    if not isinstance(value, dict):
        raise ContentError("no object", f"a {type(value).__name__} instead of an object")
    if "prefix" not in value and "suffix" not in value:
        raise ContentError("no prefix or suffix", f"it has {', '.join(map(str, value))[:120]}")
    image = value.get("image")
    if image is not None:
        if not isinstance(image, str):
            raise ContentError("missing image", f"a {type(image).__name__} instead of a path")
        image = check_image_path(image, images)
    return Prompted(image, _field_text(value, "prefix") or "", _field_text(value, "suffix"))


def _field_text(value: dict[str, Any], field: str) -> str | None:
    text = value.get(field)
    if text is None:
        return None
    if not isinstance(text, str):
        raise ContentError("bad text", f"{field} is {type(text).__name__}, not text")
    try:
        text = check_text(text)
    except ContentError as error:
        raise ContentError(error.reason, f"{field}: {error.detail}") from None
    for kind, number in LOCATION_TOKEN.findall(text):
        digits, bins = BINS[kind]
        if len(number) != digits or int(number) >= bins:
            raise ContentError(
                "bad location token",
                f"<{kind}{number}> in {field}; there are {bins} <{kind}> tokens, with {digits} digits",
            )
    return text
