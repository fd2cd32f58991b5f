"""Conversations with pictures: LLaVA's and ShareGPT's json and jsonl, and their Hugging Face ports (messages)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

from data_pipeline.errors import ContentError
from data_pipeline.formats.records import SURROGATE, BadRecord, check_image_path
from data_pipeline.formats.text_records import LONGEST, parsed, reading

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
# List of turns -> (who speaks, what is said).
TURNS = {"conversations": ("from", "value"), "messages": ("role", "content")}


@dataclass(frozen=True, slots=True)
class Turn:
    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """One dialogue. images: paths below the folder of pictures, none for text alone; each `<image>` in the turns
    of system and user stands for the next of them. One picture without an `<image>` stands before the first turn,
    as SPHINX has it. id: as text; None where the file has none."""

    id: str | None
    turns: tuple[Turn, ...]
    images: tuple[str, ...]


def read_conversations(
    path: str, images: str | None = None, longest: int = LONGEST
) -> Iterator[tuple[str, Conversation | BadRecord]]:
    """(place, record or why it is none) of every entry of a json list or line of a jsonl file, in order.

    `images` is the folder of pictures, where the user gave one: absolute paths below it are taken. Memory does
    not grow with the file. Verdicts beside those of `json_stream.records`: `no object`, `no turns`, `bad turn`,
    `unknown role`, `wrong turn order`, `no answer`, `unsafe image path`, `missing image`, `<image> count`,
    `not UTF-8`.
    """
    with reading(path) as file:
        yield from conversations_of(path, file, images, longest)


def conversations_of(
    path: str, file: BinaryIO, images: str | None = None, longest: int = LONGEST
) -> Iterator[tuple[str, Conversation | BadRecord]]:
    """`read_conversations` of an opened file."""
    return parsed(path, file, longest, lambda value: parse(value, images))


def parse(value: Any, images: str | None = None) -> Conversation:
    """One record. Raises ContentError, whose reasons `read_conversations` lists."""
    if not isinstance(value, dict):
        raise ContentError("no object", f"a {type(value).__name__} where an object is expected")
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
    return tuple(_turn(one, number, *TURNS[field]) for number, one in enumerate(listed))


def _turn(one: Any, number: int, speaker: str, said: str) -> Turn:
    if not isinstance(one, dict) or not isinstance(one.get(speaker), str):
        raise ContentError("bad turn", f"turn {number} is no object with {speaker!r} and {said!r}")
    role = ROLES.get(one[speaker].strip().lower())
    if role is None:
        raise ContentError("unknown role", f"turn {number} is from {one[speaker][:40]!r}")
    text = _text(one.get(said))
    if text is None:
        raise ContentError(
            "bad turn", f"{said!r} of turn {number} is {type(one.get(said)).__name__}, not text"
        )
    if SURROGATE.search(text):
        raise ContentError("not UTF-8", f"turn {number}")
    return Turn(role, text)


def _text(said: Any) -> str | None:
    """A string, or the list of parts that multi-modal chat templates take: {"type": "text" | "image"}."""
    if isinstance(said, str):
        return said
    if not isinstance(said, list):
        return None
    words = []
    for part in said:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            words.append(part["text"])
        elif kind in ("image", "image_url"):
            words.append(IMAGE_TOKEN)
        else:
            return None
    return "\n".join(words)


def _image_paths(value: Mapping[str, Any]) -> list[str]:
    """`image`: a path or a list of them; `images`: a list of paths or of {"path": ...}."""
    found = value.get("image") or value.get("images") or []
    listed = found if isinstance(found, list) else [found]
    paths: list[str] = []
    for one in listed:
        path = one.get("path") if isinstance(one, dict) else one
        if not isinstance(path, str):
            raise ContentError("missing image", f"a {type(path).__name__} where a path is expected")
        paths.append(path)
    return paths


def _check_order(turns: tuple[Turn, ...]) -> None:
    """After an optional system turn, user and assistant by turns, to an answer."""
    spoken = [turn.role for turn in turns if turn.role != "system"]
    if "assistant" not in spoken:
        raise ContentError("no answer", f"{len(spoken)} turns, none of them the assistant's")
    if any(turn.role == "system" for turn in turns[1:]):
        raise ContentError("wrong turn order", "a system turn that is not the first")
    expected = ["user", "assistant"] * (len(spoken) // 2 + 1)
    for number, (role, wanted) in enumerate(zip(spoken, expected, strict=False)):
        if role != wanted:
            raise ContentError(
                "wrong turn order", f"spoken turn {number} is the {role}'s, not the {wanted}'s"
            )


def _check_images(turns: tuple[Turn, ...], images: int) -> None:
    tokens = sum(turn.text.count(IMAGE_TOKEN) for turn in turns if turn.role != "assistant")
    if any(IMAGE_TOKEN in turn.text for turn in turns if turn.role == "assistant"):
        raise ContentError("<image> count", "an answer holds <image>")
    if tokens != images and (tokens, images) != (0, 1):
        raise ContentError("<image> count", f"{tokens} <image> for {images} pictures")
