"""Tokens that only tokenizer settings name: a library adds them after the last token, perhaps beyond the last row."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from pretrain.weights.companions import as_json, read_companion
from pretrain.weights.folder import parse_json

Companions = Mapping[str, Path | bytes]
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
LISTS = ("extra_special_tokens", "additional_special_tokens")
SHOWN = 3  # tokens in a message


def named_tokens(companions: Companions, where: str) -> dict[str, str]:
    """Token -> the settings file that names it."""
    return {token: name for name in SETTINGS for _, token in _named(_content(companions, name, where))}


def without_missing(companions: Companions, ids: Collection[str], where: str) -> dict[str, Path | bytes]:
    """The companions; lists of additional special tokens keep only tokens of `ids`.

    Raises UserError if a setting such as eos_token names a token that `ids` lacks.
    """
    out = dict(companions)
    for name in SETTINGS:
        content = _content(companions, name, where)
        missing = [(key, token) for key, token in _named(content) if token not in ids]
        if not missing or not isinstance(content, dict):
            continue
        for key, token in missing:
            if key not in LISTS:
                raise UserError(
                    f"{where}: {name}: {key} is {token!r}, which the merged vocabulary does not have; choose "
                    "--vocabulary union, or take the tokenizer of a model without it (--copy-rest)"
                )
            listed = content[key]
            if isinstance(listed, dict):
                content[key] = {k: value for k, value in listed.items() if _text(value) != token}
            else:
                content[key] = [value for value in listed if _text(value) != token]
        out[name] = as_json(content)
    return out


def tokens_beyond(companions: Companions, ids: Mapping[str, int], rows: int, where: str) -> str | None:
    """What is wrong if a token of the tokenizer has no row among `rows`; None if all have one.

    ids: token -> id in the tokenizer's files. A token that only the settings name gets the next free id.
    """
    beyond = [token for token, number in ids.items() if number >= rows]
    free = max(len(ids), max(ids.values(), default=-1) + 1)
    new = [token for token in named_tokens(companions, where) if token not in ids]
    beyond += new[max(0, rows - free) :]
    if not beyond:
        return None
    more = f" and {len(beyond) - SHOWN} more" if len(beyond) > SHOWN else ""
    listed = ", ".join(map(repr, beyond[:SHOWN]))
    return (
        f"the tokenizer has tokens without a row among the {rows} of the embedding: {listed}{more}; a model fails at "
        "such a token"
    )


def _content(companions: Companions, name: str, where: str) -> Any:
    return parse_json(read_companion(companions[name]), f"{where}: {name}") if name in companions else None


def _named(content: Any) -> Iterator[tuple[str, str]]:
    """Key and text of every token that settings name."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if key in LISTS:
            inner = (
                list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
            )
        elif key.endswith("_token"):
            inner = [value]
        elif key == "added_tokens_decoder" and isinstance(value, dict):
            continue  # stands for ids that the tokenizer's files have
        else:
            continue
        yield from ((key, text) for entry in inner if (text := _text(entry)) is not None)


def _text(entry: Any) -> str | None:
    """A token is written as text or as an object with `content`."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None
