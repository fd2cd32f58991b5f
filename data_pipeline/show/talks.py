"""Conversations and prompts as a page shows them: turns, the picture beside them, boxes that an answer names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipeline import storage
from data_pipeline.errors import ContentError
from data_pipeline.formats.image_path import image_url
from data_pipeline.show.samples import Picture, need_pillow, picture_of
from data_pipeline.transforms.decode import ImageSpec

TURN = 1500  # characters of a turn
TURNS = 12
# PaliGemma's corners y0 x0 y1 x1 in 1024 bins.
CORNERS = re.compile(r"<loc(\d{4})><loc(\d{4})><loc(\d{4})><loc(\d{4})>")
TOKENS = re.compile(r"<image>|(?:<(?:loc|seg)\d+>)+")


@dataclass
class Talk:
    """`turns`: role and parts, each a text and the token behind it; `boxes` in percent of the picture."""

    key: str
    turns: list[tuple[str, list[tuple[str, str]]]]
    pictures: list[Picture] = field(default_factory=list)
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def talks(records: Sequence[Mapping[str, Any]], root: str) -> tuple[list[Talk], int]:
    """The records as talks with the pictures found below `root`, and how many pictures were not."""
    need_pillow()
    made = [_talk(record, root) for record in records]
    return made, sum(len(talk.missing) for talk in made)


def boxes(text: str) -> list[tuple[float, float, float, float]]:
    """(left, top, width, height) in percent, of every four corners in the text."""
    found = []
    for match in CORNERS.finditer(text):
        y0, x0, y1, x1 = (int(number) / 10.24 for number in match.groups())
        found.append((x0, y0, max(x1 - x0, 0.0), max(y1 - y0, 0.0)))
    return found


def _talk(record: Mapping[str, Any], root: str) -> Talk:
    turns = record["turns"][:TURNS]
    talk = Talk(record["key"], [(turn["role"], _parts(turn["text"][:TURN])) for turn in turns])
    for turn in turns:
        talk.boxes += boxes(turn["text"])
    for path in record["images"]:
        try:
            data = storage.read_bytes(image_url(path, root))
            talk.pictures.append(picture_of(data, ImageSpec(32), path))
        except ContentError as error:
            talk.missing.append(f"{path}: {error}")
        except OSError as error:
            talk.missing.append(f"{path} cannot be read below {root}: {error.strerror or error}")
    return talk


def _parts(text: str) -> list[tuple[str, str]]:
    """Plain text and the token that follows it, so that tokens can be set apart."""
    parts, end = [], 0
    for match in TOKENS.finditer(text):
        parts.append((text[end : match.start()], match.group()))
        end = match.end()
    return [*parts, (text[end:], "")]
