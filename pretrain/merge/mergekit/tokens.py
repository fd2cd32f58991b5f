"""What a mergekit file says of tokens: whose tokenizer the output has, and where rows of single tokens come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from data_pipeline.errors import UserError


@dataclass(frozen=True)
class TokenRow:
    """Where the row of a token comes from in models that lack the token; with `force`, in all.

    model: address; None: zeros.
    row:   of that model: the token of that name, or of that number; None: the token's own row there.
    """

    model: str | None
    row: str | int | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerRule:
    """source: `union`, `base`, or the address of the model whose tokenizer the output has."""

    source: str
    multiple: int = 1
    rows: Mapping[str, TokenRow] = field(default_factory=dict)


def parse_tokenizer_rule(
    where: str, values: Mapping[str, Any], model: Callable[[Any], str]
) -> TokenizerRule | None:
    """`tokenizer_source` or `tokenizer` of a file; `model` makes an address of a reference."""
    short, block = values.get("tokenizer_source"), values.get("tokenizer")
    if short and block is not None:
        raise UserError(f"{where}: tokenizer_source and tokenizer say the same; leave one out")
    if block is None:
        return TokenizerRule(_source(short, model)) if short else None
    if not isinstance(block, dict):
        raise UserError(f"{where}: tokenizer is a map: source, tokens, pad_to_multiple_of")
    _only(f"{where}: tokenizer", block, ("source", "tokens", "pad_to_multiple_of"))
    multiple = block.get("pad_to_multiple_of")
    if multiple is not None and (type(multiple) is not int or not 0 < multiple <= 1 << 20):
        raise UserError(f"{where}: tokenizer: pad_to_multiple_of {multiple!r} is no number of rows")
    tokens = block.get("tokens") or {}
    if not isinstance(tokens, dict):
        raise UserError(f"{where}: tokenizer: tokens is a map of tokens")
    rows = {str(token): _row(f"{where}: tokenizer: {token}", given, model) for token, given in tokens.items()}
    return TokenizerRule(_source(block.get("source") or "union", model), multiple or 1, rows)


def _source(given: Any, model: Callable[[Any], str]) -> Literal["union", "base"] | str:
    if given in ("union", "base"):
        return str(given)
    # Files from before 2024 have this prefix.
    return model(given.removeprefix("model:") if isinstance(given, str) else given)


def _row(where: str, given: Any, model: Callable[[Any], str]) -> TokenRow:
    if not isinstance(given, dict) or given.get("source") is None:
        raise UserError(f"{where}: write source, a model or a map with kind")
    _only(where, given, ("source", "force"))
    source, force = given["source"], given.get("force", False)
    if not isinstance(force, bool):
        raise UserError(f"{where}: force {force!r}: true or false")
    kind = source.get("kind") if isinstance(source, dict) else None
    if kind is None:
        return TokenRow(model(source), None, force)
    if kind == "zero":
        return TokenRow(None, None, force)
    if kind != "model_token":
        raise UserError(f"{where}: kind {kind!r}: zero or model_token")
    _only(where, source, ("kind", "model", "token", "token_id"))
    token, number = source.get("token"), source.get("token_id")
    if (token is None) == (number is None) or not isinstance(token, str | None) or type(number) is bool:
        raise UserError(f"{where}: write either token, a text, or token_id, a number")
    if not isinstance(number, int | None) or source.get("model") is None:
        raise UserError(f"{where}: model_token needs model, and token or token_id")
    return TokenRow(model(source["model"]), token if token is not None else number, force)


def _only(where: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if unknown := [str(key) for key in given if key not in known]:
        raise UserError(f"{where}: {', '.join(unknown)} not supported; supported: {', '.join(known)}")
