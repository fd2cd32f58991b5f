"""`tokenizer_source` and `tokenizer` of a mergekit file: the tokenizer of the output, and rules for single tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from data_pipeline.errors import UserError


@dataclass(frozen=True)
class TokenRow:
    """Where a token's row comes from if a model lacks the token; with `force`, always.

    model: address; None gives zeros.
    row:   token or row index in that model; None is the row of the token itself.
    """

    model: str | None
    row: str | int | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerRule:
    """The tokenizer of the output.

    source:   `union`, `base`, or the address of a model.
    multiple: the number of rows is rounded up to a multiple of it.
    rows:     token -> origin of its row.
    """

    source: str
    multiple: int = 1
    rows: Mapping[str, TokenRow] = field(default_factory=dict)


def parse_tokenizer_rule(
    where: str, values: Mapping[str, Any], model: Callable[[Any], str]
) -> TokenizerRule | None:
    """Parse `tokenizer_source` or `tokenizer` of a file; `model` turns a model reference into an address."""
    short, block = values.get("tokenizer_source"), values.get("tokenizer")
    if short and block is not None:
        raise UserError(f"{where}: tokenizer_source and tokenizer have the same purpose; leave one out")
    if block is None:
        return TokenizerRule(_source(short, model)) if short else None
    if not isinstance(block, dict):
        raise UserError(f"{where}: tokenizer must be a map with source, tokens, pad_to_multiple_of")
    refuse_unknown_keys(f"{where}: tokenizer", block, ("source", "tokens", "pad_to_multiple_of"))
    multiple = block.get("pad_to_multiple_of")
    if multiple is not None and (type(multiple) is not int or not 0 < multiple <= 1 << 20):
        raise UserError(
            f"{where}: tokenizer: pad_to_multiple_of {multiple!r} is not a number of rows from 1 to {1 << 20}"
        )
    tokens = block.get("tokens") or {}
    if not isinstance(tokens, dict):
        raise UserError(f"{where}: tokenizer: tokens must be a map of tokens")
    rows = {str(token): _row(f"{where}: tokenizer: {token}", value, model) for token, value in tokens.items()}
    return TokenizerRule(_source(block.get("source") or "union", model), multiple or 1, rows)


def _source(value: Any, model: Callable[[Any], str]) -> Literal["union", "base"] | str:
    if value in ("union", "base"):
        return str(value)
    # Files written before 2024 have this prefix.
    return model(value.removeprefix("model:") if isinstance(value, str) else value)


def _row(where: str, value: Any, model: Callable[[Any], str]) -> TokenRow:
    if not isinstance(value, dict) or value.get("source") is None:
        raise UserError(f"{where}: needs a source: a model, or a map with kind")
    refuse_unknown_keys(where, value, ("source", "force"))
    source, force = value["source"], value.get("force", False)
    if not isinstance(force, bool):
        raise UserError(f"{where}: force {force!r}: must be true or false")
    kind = source.get("kind") if isinstance(source, dict) else None
    if kind is None:
        return TokenRow(model(source), None, force)
    if kind == "zero":
        return TokenRow(None, None, force)
    if kind != "model_token":
        raise UserError(f"{where}: kind {kind!r}: must be zero or model_token")
    refuse_unknown_keys(where, source, ("kind", "model", "token", "token_id"))
    token, number = source.get("token"), source.get("token_id")
    if (token is None) == (number is None) or not isinstance(token, str | None) or type(number) is bool:
        raise UserError(f"{where}: write either token (a string) or token_id (a number)")
    if not isinstance(number, int | None) or source.get("model") is None:
        raise UserError(f"{where}: model_token needs model, and either token or token_id")
    return TokenRow(model(source["model"]), token if token is not None else number, force)


def refuse_unknown_keys(where: str, value: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raises UserError that lists the keys of `value` that are not in `known`."""
    if unknown := [str(key) for key in value if key not in known]:
        raise UserError(f"{where}: {', '.join(unknown)} not supported; supported: {', '.join(known)}")
