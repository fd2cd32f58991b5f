"""Conversations with images: LLaVA's and ShareGPT's json and jsonl, and their Hugging Face ports (messages)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

from data_pipeline.errors import ContentError
from data_pipeline.formats.records import BadRecord, check_image_path
from data_pipeline.formats.text_records import MAX_RECORD_BYTES, open_text, parse_records
from data_pipeline.text_encoding import check_text

Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}
IMAGE_TOKEN = "<image>"
# Field with the list of turns -> (field of the role, field of the text) in each turn.
TURNS = {"conversations": ("from", "value"), "messages": ("role", "content")}


@dataclass(frozen=True, slots=True)
class Turn:
    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """One dialogue.

    id: as text, None if the record has none
    images: paths below the image folder, () for text alone. The n-th `<image>` in the system and user turns is the n-th
        image; a single image without any `<image>` comes before the first turn, as in SPHINX.
    """

    id: str | None
    turns: tuple[Turn, ...]
    images: tuple[str, ...]


def read_conversations(
    path: str, images: str | None = None, max_bytes: int = MAX_RECORD_BYTES
) -> Iterator[tuple[str, Conversation | BadRecord]]:
    """Yield (place, Conversation or BadRecord) per entry of a json list or line of a jsonl file, in order.

    `images`: the image folder, if the user named one; absolute paths below it are accepted. Memory does not grow with
    the file. Reasons of a BadRecord besides those of `text_records.records`: `no object`, `no turns`, `bad turn`,
    `unknown role`, `wrong turn order`, `no answer`, `unsafe image path`, `missing image`, `<image> count`, `bad id`,
    `not UTF-8`, `NUL in text`.
    """
    with open_text(path) as file:
        yield from conversations_of(path, file, images, max_bytes)


def conversations_of(
    path: str, file: BinaryIO, images: str | None = None, max_bytes: int = MAX_RECORD_BYTES
) -> Iterator[tuple[str, Conversation | BadRecord]]:
    """`read_conversations` of an open file."""
    return parse_records(path, file, max_bytes, lambda value: parse(value, images))


def parse(value: Any, images: str | None = None) -> Conversation:
    """One record. Raises ContentError, whose reasons `read_conversations` lists."""
    if not isinstance(value, dict):
        raise ContentError("no object", f"a {type(value).__name__} instead of an object")
    turns = _turns(value)
    paths = tuple(check_image_path(path, images) for path in _image_paths(value))
    _check_order(turns)
    _check_images(turns, len(paths))
    name = value.get("id")
    if name is not None and not isinstance(name, (str, int, float)):
        raise ContentError("bad id", f"a {type(name).__name__}")
    return Conversation(None if name is None else str(name), turns, paths)


def _turns(value: Mapping[str, Any]) -> tuple[Turn, ...]:
    field = next((name for name in TURNS if name in value), None)
    if field is None:
        raise ContentError(
            "no turns", f"neither {' nor '.join(TURNS)} among {', '.join(map(str, value))[:120]}"
        )
    listed = value[field]
    if not isinstance(listed, list) or not listed:
        raise ContentError("no turns", f"{field} is {'empty' if listed == [] else type(listed).__name__}")
    return tuple(_turn(turn, number, *TURNS[field]) for number, turn in enumerate(listed))


def _turn(turn: Any, number: int, role_field: str, text_field: str) -> Turn:
    if not isinstance(turn, dict) or not isinstance(turn.get(role_field), str):
        raise ContentError(
            "bad turn", f"turn {number} is not an object with {role_field!r} and {text_field!r}"
        )
    role = ROLES.get(turn[role_field].strip().lower())
    if role is None:
        raise ContentError("unknown role", f"turn {number} is from {turn[role_field][:40]!r}")
    text = _text(turn.get(text_field))
    if text is None:
        raise ContentError(
            "bad turn", f"{text_field!r} of turn {number} is {type(turn.get(text_field)).__name__}, not text"
        )
    try:
        return Turn(role, check_text(text))
    except ContentError as error:
        raise ContentError(error.reason, f"turn {number}: {error.detail}") from None


def _text(content: Any) -> str | None:
    """The text of a turn: a string, or a list of {"type": "text" | "image", ...} as multi-modal chat templates take."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    words = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            words.append(part["text"])
        elif kind in ("image", "image_url"):
            words.append(IMAGE_TOKEN)
        else:
            return None
    return "\n".join(words)


def _image_paths(value: Mapping[str, Any]) -> list[str]:
    """The paths in `image` (a path or a list) or `images` (a list of paths or of {"path": ...})."""
    found = value.get("image") or value.get("images") or []
    listed = found if isinstance(found, list) else [found]
    paths: list[str] = []
    for item in listed:
        path = item.get("path") if isinstance(item, dict) else item
        if not isinstance(path, str):
            raise ContentError("missing image", f"a {type(path).__name__} instead of a path")
        paths.append(path)
    return paths


def _check_order(turns: tuple[Turn, ...]) -> None:
    """Check that user and assistant alternate after an optional system turn, and that there is an answer."""
    spoken = [turn.role for turn in turns if turn.role != "system"]
    if "assistant" not in spoken:
        raise ContentError("no answer", f"{len(spoken)} turns, none of them by the assistant")
    if any(turn.role == "system" for turn in turns[1:]):
        raise ContentError("wrong turn order", "a system turn that is not the first")
    expected = ["user", "assistant"] * (len(spoken) // 2 + 1)
    for number, (role, expected_role) in enumerate(zip(spoken, expected, strict=False)):
        if role != expected_role:
            raise ContentError(
                "wrong turn order",
                f"turn {number} after the system turn is by the {role}, not the {expected_role}",
            )


def _check_images(turns: tuple[Turn, ...], images: int) -> None:
    tokens = sum(turn.text.count(IMAGE_TOKEN) for turn in turns if turn.role != "assistant")
    if any(IMAGE_TOKEN in turn.text for turn in turns if turn.role == "assistant"):
        raise ContentError("<image> count", "an answer contains <image>")
    if tokens != images and (tokens, images) != (0, 1):
        raise ContentError("<image> count", f"{tokens} <image> for {images} images")
