"""tokenizer.json: read, joined or reduced to a token set; and the companions that refer to tokens by id."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from pretrain.merge.vocabulary.named_tokens import without_missing
from pretrain.merge.vocabulary.tokenizer_legacy import read_ids
from pretrain.weights.companions import adapted_config, as_json, read_companion
from pretrain.weights.folder import parse_json

FILE = "tokenizer.json"
MODEL_TYPES = ("BPE", "WordPiece", "WordLevel", "Unigram")
TOKEN_ID_KEY = re.compile(r"_token_(id|ids|index)$")
# Older forms of the same tokenizer, with its original ids: outdated once tokenizer.json changes.
STALE = ("added_tokens.json", "merges.txt", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
TOKENIZER_FILES = (FILE, "tokenizer_config.json", "special_tokens_map.json", *STALE)
Companions = Mapping[str, Path | bytes]


def is_tokenizer_file(name: str) -> bool:
    """True if a companion belongs to the tokenizer; a chat template does not."""
    return (
        name in TOKENIZER_FILES
        or name.endswith((".model", ".tiktoken"))
        or name.startswith(("tokenizer", "vocab."))
    )


@dataclass(frozen=True)
class Tokenizer:
    """One tokenizer.

    where:   its address, for messages.
    content: parsed tokenizer.json; empty if the ids come from older files and may be incomplete.
    ids:     token -> id, with added tokens.
    """

    where: str
    content: dict[str, Any]
    ids: dict[str, int]

    def contradicts(self, other: Tokenizer) -> bool:
        """True if a token has different ids, or an id has different tokens.

        If both tokenizers are complete: True if their ids differ at all.
        """
        if self.content and other.content:
            return self.ids != other.ids
        tokens = {number: token for token, number in other.ids.items()}
        return any(
            other.ids.get(token, number) != number or tokens.get(number, token) != token
            for token, number in self.ids.items()
        )

    @property
    def kind(self) -> str:
        """Model type: BPE, WordPiece, ..."""
        return str(self.content["model"].get("type"))


def read_tokenizer(companions: Companions, where: str) -> Tokenizer | None:
    """Read the tokenizer from companions: tokenizer.json, else older files (tokenizer_legacy).

    Returns None if there is none. Raises UserError if it is malformed.
    """
    if FILE not in companions:
        ids = read_ids(companions, where)
        return None if ids is None else Tokenizer(where, {}, ids)
    where = f"{where}: {FILE}"
    content = parse_json(read_companion(companions[FILE]), where)
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: (piece, score) pairs; the position is the id
            pieces = [piece for piece, _ in vocabulary]
            ids = {piece: number for number, piece in enumerate(pieces)}
            if len(ids) != len(pieces):
                raise ValueError("a piece occurs twice")
        else:
            ids = dict(vocabulary)
        for added in content.get("added_tokens") or []:
            if ids.setdefault(added["content"], added["id"]) != added["id"]:
                raise ValueError(f"{added['content']!r} has two ids")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: malformed tokenizer: {error}") from None
    if not all(isinstance(token, str) and type(n) is int and 0 <= n < 1 << 31 for token, n in ids.items()):
        raise UserError(
            f"{where}: malformed tokenizer: a token is not a string, or its id is not a valid number"
        )
    if len(set(ids.values())) != len(ids):
        raise UserError(f"{where}: malformed tokenizer: two tokens have the same id")
    return Tokenizer(where, content, ids)


def joint_tokenizer_json(tokenizers: Sequence[Tokenizer], ids: Mapping[str, int]) -> bytes:
    """tokenizer.json of the first tokenizer with exactly the tokens and ids of `ids`.

    Tokens that the first one lacks come from the others: added tokens unchanged, model pieces with their merges or
    scores. Raises UserError if the tokenizers differ in another part, which it names, or if one is malformed.
    """
    try:
        return _joint_tokenizer_json(tokenizers, ids)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        names = " or ".join(tokenizer.where for tokenizer in tokenizers)
        raise UserError(f"{names}: malformed tokenizer ({error!r}); download or write it again") from None


def _joint_tokenizer_json(tokenizers: Sequence[Tokenizer], ids: Mapping[str, int]) -> bytes:
    first = tokenizers[0]
    _check_content(first)
    content = copy.deepcopy(first.content)
    added = {entry["content"]: entry for entry in first.content.get("added_tokens") or []}
    for other in tokenizers[1:]:
        for entry in other.content.get("added_tokens") or []:
            if entry["content"] not in first.ids:
                added.setdefault(entry["content"], entry)
    donors = [
        t for t in tokenizers[1:] if any(x in t.ids and x not in first.ids and x not in added for x in ids)
    ]
    for donor in donors:
        _check_content(donor)
        _check_compatible(first, donor)
    content["model"] = _model([first, *donors], ids)
    kept = [{**entry, "id": ids[token]} for token, entry in added.items() if token in ids]
    content["added_tokens"] = sorted(kept, key=lambda entry: entry["id"])
    if isinstance(content["model"]["vocab"], dict):
        # The tokenizers library gives added tokens ids after the model's own, unless the model's vocab has them too.
        content["model"]["vocab"] |= {entry["content"]: entry["id"] for entry in kept}
    _renumber(content.get("post_processor"), ids, first.where)
    if isinstance(content.get("padding"), dict):
        content["padding"]["pad_id"] = _id(content["padding"].get("pad_token"), ids, first.where)
    return json.dumps(content, ensure_ascii=False, indent=2).encode("utf-8")


def _check_content(tokenizer: Tokenizer) -> None:
    if not tokenizer.content:
        raise UserError(
            f"{tokenizer.where}: has no {FILE}, which a joint tokenizer needs; write it with transformers: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )


def _check_compatible(first: Tokenizer, other: Tokenizer) -> None:
    if first.kind not in MODEL_TYPES or first.kind != other.kind:
        raise UserError(
            f"{first.where} is {first.kind}, {other.where} is {other.kind}: these cannot be joined into one "
            "tokenizer; write vocabulary: intersect or pad"
        )
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if first.content.get(part) != other.content.get(part):
            raise UserError(
                f"{first.where} and {other.where} differ in their {part}: these cannot be joined into one "
                "tokenizer; write vocabulary: intersect or pad"
            )


def _model(tokenizers: Sequence[Tokenizer], ids: Mapping[str, int]) -> dict[str, Any]:
    """The `model` section: vocab under the new ids, and the merges whose parts and result are all in `ids`."""
    model: dict[str, Any] = copy.deepcopy(tokenizers[0].content["model"])
    if isinstance(model["vocab"], list):
        scores = {piece: score for t in reversed(tokenizers) for piece, score in t.content["model"]["vocab"]}
        ordered = sorted((token for token in scores if token in ids), key=lambda token: ids[token])
        if [ids[token] for token in ordered] != list(range(len(ordered))):
            raise UserError(
                f"{tokenizers[0].where}: the id of a piece is its position, and the joined tokens would leave gaps; "
                "write vocabulary: pad"
            )
        model["vocab"] = [[token, scores[token]] for token in ordered]
        if model.get("unk_id") is not None:
            unknown = tokenizers[0].content["model"]["vocab"][model["unk_id"]][0]
            model["unk_id"] = _id(unknown, ids, tokenizers[0].where)
        return model
    first_tokens = set(model["vocab"])
    tokens = {token for t in tokenizers for token in t.content["model"]["vocab"] if token in ids}
    model["vocab"] = {token: ids[token] for token in sorted(tokens, key=lambda token: ids[token])}
    if "merges" in model:
        merges: dict[tuple[str, str], Any] = {}
        for t in tokenizers:
            for merge in t.content["model"]["merges"]:
                left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
                # Skip merges of other tokenizers that produce a token of the first one: otherwise they would change
                # how the first one tokenizes text.
                if {left, right, left + right} <= tokens and (
                    t is tokenizers[0] or left + right not in first_tokens
                ):
                    merges.setdefault((left, right), merge)
        model["merges"] = list(merges.values())
    return model


def _renumber(processor: Any, ids: Mapping[str, int], where: str) -> None:
    """Set the new ids in a post_processor, in place."""
    if not isinstance(processor, dict):
        return
    for inner in processor.get("processors") or []:
        _renumber(inner, ids, where)
    for name in ("sep", "cls"):
        if isinstance(processor.get(name), list):
            processor[name] = [processor[name][0], _id(processor[name][0], ids, where)]
    special = processor.get("special_tokens")
    for entry in special.values() if isinstance(special, dict) else []:
        entry["ids"] = [_id(token, ids, where) for token in entry["tokens"]]


def _id(token: Any, ids: Mapping[str, int], where: str) -> int:
    if token not in ids:
        raise UserError(f"{where}: needs the token {token!r}, which the merged vocabulary does not have")
    return ids[token]


def renumbered_companions(
    companions: Companions, tokenizer: Tokenizer, ids: Mapping[str, int], joined: bytes, rows: int
) -> dict[str, Path | bytes]:
    """Companions with new token ids: `joined` as tokenizer.json, and new ids in the settings that refer to tokens.

    ids:  token -> id in the output.
    rows: number of rows of the output's embeddings.
    """
    by_number = {number: token for token, number in tokenizer.ids.items()}
    out: dict[str, Path | bytes] = {name: c for name, c in companions.items() if name not in STALE}
    out[FILE] = joined
    for name in ("config.json", "generation_config.json"):
        if name in out:
            content = parse_json(read_companion(out[name]), f"{tokenizer.where}: {name}")
            _renumber_settings(content, by_number, ids, f"{tokenizer.where}: {name}")
            if name == "config.json":
                content = adapted_config(content, {"vocab_size": rows})
            out[name] = as_json(content)
    return without_missing(_with_added_tokens(out, joined, tokenizer.where), ids, tokenizer.where)


def _tokens_of(joined: bytes) -> set[str]:
    """All tokens of a tokenizer.json."""
    tokenizer = read_tokenizer({FILE: joined}, "the joint tokenizer")
    return set(tokenizer.ids) if tokenizer is not None else set()


def _with_added_tokens(companions: Companions, joined: bytes, where: str) -> dict[str, Path | bytes]:
    """Replace `added_tokens_decoder` in tokenizer_config.json, if it has one, by the tokens of `joined`."""
    settings = companions.get("tokenizer_config.json")
    content = parse_json(read_companion(settings), where) if settings is not None else None
    if not isinstance(content, dict) or not isinstance(content.get("added_tokens_decoder"), dict):
        return dict(companions)
    content["added_tokens_decoder"] = {
        str(entry["id"]): {key: value for key, value in entry.items() if key not in ("id", "content")}
        | {"content": entry["content"]}
        for entry in json.loads(joined)["added_tokens"]
    }
    return {**companions, "tokenizer_config.json": as_json(content)}


def _renumber_settings(
    content: Any, by_number: Mapping[int, str], ids: Mapping[str, int], where: str, skip: Any = None
) -> None:
    """Set the new ids of `eos_token_id` and similar settings, in place and in nested sections; skip keys of `skip`."""
    if not isinstance(content, dict):
        return
    skipped = skip if isinstance(skip, dict) else {}
    for key, value in content.items():
        if isinstance(value, dict):
            _renumber_settings(value, by_number, ids, where, skipped.get(key))
        elif TOKEN_ID_KEY.search(key) and key not in skipped:
            old = value if isinstance(value, list) else [value]
            new = [
                _id(by_number[number], ids, where) if type(number) is int and number in by_number else number
                for number in old
            ]
            content[key] = new if isinstance(value, list) else new[0]


def with_tokenizer(
    companions: Companions,
    donor: Companions,
    joined: bytes | None,
    rows: int,
    where: str,
    new_ids: tuple[Tokenizer, Mapping[str, int]] | None = None,
) -> dict[str, Path | bytes]:
    """Companions with the tokenizer of `donor`, its ids of special tokens, and `rows` as vocab_size in config.json.

    joined:  replaces the donor's tokenizer.json, if given.
    new_ids: the tokenizer of `companions`, and token -> id in the output. An id that the donor's settings do not set is
             replaced by the new id of the same token; without `new_ids` it stays unchanged. Raises UserError for a
             token that the output does not have.
    """
    out = {name: content for name, content in companions.items() if not is_tokenizer_file(name)}
    theirs = {name: content for name, content in donor.items() if is_tokenizer_file(name)}
    if joined is not None:
        theirs = {name: c for name, c in theirs.items() if name.startswith(("tokenizer_config", "special"))}
        theirs = without_missing(_with_added_tokens(theirs, joined, where), _tokens_of(joined), where)
        theirs |= {FILE: joined}
    adapted: dict[str, Path | bytes] = {**out, **theirs}
    for name in ("config.json", "generation_config.json"):
        content = parse_json(read_companion(adapted[name]), f"{where}: {name}") if name in adapted else None
        if not isinstance(content, dict):
            continue
        if donor is not companions:
            settings = parse_json(read_companion(donor[name]), name) if name in donor else {}
            if new_ids is not None:
                tokens = {number: token for token, number in new_ids[0].ids.items()}
                _renumber_settings(content, tokens, new_ids[1], f"{where}: {name}", settings)
            content = _with_donor_ids(content, settings)
        adapted[name] = as_json(
            adapted_config(content, {"vocab_size": rows}) if name == "config.json" else content
        )
    return adapted


def _with_donor_ids(content: dict[str, Any], donor: Any) -> dict[str, Any]:
    """`content` with the donor's `eos_token_id` and similar settings, also in nested sections."""
    if not isinstance(donor, dict):
        return content
    out = dict(content)
    for key, value in content.items():
        if isinstance(value, dict):
            out[key] = _with_donor_ids(value, donor.get(key))
        elif TOKEN_ID_KEY.search(key) and key in donor:
            out[key] = donor[key]
    return out
