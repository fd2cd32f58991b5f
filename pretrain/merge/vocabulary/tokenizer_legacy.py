"""Token -> id from files older than tokenizer.json: vocab.json, vocab.txt and SentencePiece models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from pretrain.weights.companions import read_companion
from pretrain.weights.folder import parse_json

Companions = Mapping[str, Path | bytes]
MODELS = ("tokenizer.model", "spiece.model")
VARINT, LENGTH = 0, 2
FIXED = {1: 8, 5: 4}  # protobuf wire types of fixed size that are skipped -> bytes


def read_ids(companions: Companions, where: str) -> dict[str, int] | None:
    """Return token -> id; None if no such file exists or its format is unknown. Raises UserError for invalid JSON.

    The map may be incomplete, because a tokenizer class can add tokens that no file lists.
    """
    ids = _model_ids(companions, where)
    if ids is None:
        return None
    for token, number in _added_tokens(companions, where):
        ids.setdefault(token, number)
    return ids if len(set(ids.values())) == len(ids) else None


def _model_ids(companions: Companions, where: str) -> dict[str, int] | None:
    if "vocab.json" in companions:
        content = parse_json(read_companion(companions["vocab.json"]), f"{where}: vocab.json")
        return dict(content) if isinstance(content, dict) and _are_ids(content) else None
    if "vocab.txt" in companions:
        lines = read_companion(companions["vocab.txt"]).decode("utf-8", "replace").rstrip("\n").split("\n")
        return {line.rstrip("\r"): number for number, line in enumerate(lines)}
    for name in MODELS:
        if name in companions:
            try:
                pieces = list(_pieces(read_companion(companions[name])))
            except (ValueError, IndexError):  # some models use this name for another format
                return None
            return {piece: number for number, piece in enumerate(pieces)} or None
    return None


def _added_tokens(companions: Companions, where: str) -> Iterator[tuple[str, int]]:
    if "added_tokens.json" in companions:
        content = parse_json(read_companion(companions["added_tokens.json"]), f"{where}: added_tokens.json")
        if isinstance(content, dict) and _are_ids(content):
            yield from content.items()
    if "tokenizer_config.json" in companions:
        content = parse_json(
            read_companion(companions["tokenizer_config.json"]), f"{where}: tokenizer_config.json"
        )
        known = content.get("added_tokens_decoder") if isinstance(content, dict) else None
        for number, token in known.items() if isinstance(known, dict) else ():
            if str(number).isdigit() and isinstance(token, dict) and isinstance(token.get("content"), str):
                yield token["content"], int(number)


def _are_ids(content: Mapping[str, object]) -> bool:
    return all(type(number) is int and 0 <= number < 1 << 31 for number in content.values())


def _pieces(raw: bytes) -> Iterator[str]:
    """Text (field 1) of each of the `pieces` (field 1) of a ModelProto in sentencepiece_model.proto."""
    for field, value in _fields(raw):
        if field == 1:
            yield next(text for inner, text in _fields(value) if inner == 1).decode("utf-8")


def _fields(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, content) of the length-delimited fields of a protobuf message; raises ValueError if it is malformed."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        field, kind = key >> 3, key & 7
        if kind == VARINT:
            _, at = _varint(raw, at)
        elif kind == LENGTH:
            size, at = _varint(raw, at)
            if at + size > len(raw):
                raise ValueError("cut off")
            yield field, raw[at : at + size]
            at += size
        elif kind in FIXED:
            at += FIXED[kind]
        else:
            raise ValueError("not protobuf")


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        value |= (raw[at] & 0x7F) << shift
        at += 1
        if raw[at - 1] < 0x80:
            return value, at
    raise ValueError("not a varint")
