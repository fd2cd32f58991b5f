"""tokenizer.json read, joined and cut token by token, and the files beside it that name tokens by number."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from pretrain.merge.vocabulary.tokenizer_legacy import read_ids
from pretrain.weights.companions import adapted_config, as_json, read_companion
from pretrain.weights.folder import parse_json

FILE = "tokenizer.json"
KINDS = ("BPE", "WordPiece", "WordLevel", "Unigram")
NUMBERED = re.compile(r"_token_(id|ids|index)$")
# These say again what tokenizer.json says, in other forms, with the numbers of the tokenizer they came with.
STALE = ("added_tokens.json", "merges.txt", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")

OURS = (FILE, "tokenizer_config.json", "special_tokens_map.json", *STALE)
Companions = Mapping[str, Path | bytes]


def is_tokenizer_file(name: str) -> bool:
    """Whether a companion belongs to the tokenizer, chat templates aside."""
    return name in OURS or name.endswith((".model", ".tiktoken")) or name.startswith(("tokenizer", "vocab."))


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.json: `where` it is from, its content, token -> id (added tokens included).

    content: empty where older files name the tokens, and maybe not all of them.
    """

    where: str
    content: dict[str, Any]
    ids: dict[str, int]

    def contradicts(self, other: Tokenizer) -> bool:
        """Whether a row is one token's here and another's there, or, where both are known in full, nobody's."""
        if self.content and other.content:
            return self.ids != other.ids
        tokens = {number: token for token, number in other.ids.items()}
        return any(
            other.ids.get(token, number) != number or tokens.get(number, token) != token
            for token, number in self.ids.items()
        )

    @property
    def kind(self) -> str:
        return str(self.content["model"].get("type"))


def read_tokenizer(companions: Companions, where: str) -> Tokenizer | None:
    """The tokenizer beside weights, from tokenizer.json, else from older files
    (pretrain.merge.vocabulary.tokenizer_legacy); None where there is none. UserError for one that is damaged."""
    if FILE not in companions:
        ids = read_ids(companions, where)
        return None if ids is None else Tokenizer(where, {}, ids)
    where = f"{where}: {FILE}"
    content = parse_json(read_companion(companions[FILE]), where)
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: pieces with scores, numbered by their place
            pieces = [piece for piece, _ in vocabulary]
            ids = {piece: number for number, piece in enumerate(pieces)}
            if len(ids) != len(pieces):
                raise ValueError("a piece stands twice")
        else:
            ids = dict(vocabulary)
        for added in content.get("added_tokens") or []:
            if ids.setdefault(added["content"], added["id"]) != added["id"]:
                raise ValueError(f"{added['content']!r} has two numbers")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: not a tokenizer: {error}") from None
    if not all(isinstance(token, str) and type(n) is int and 0 <= n < 1 << 31 for token, n in ids.items()):
        raise UserError(f"{where}: not a tokenizer: a token that is no text, or whose number is none")
    if len(set(ids.values())) != len(ids):
        raise UserError(f"{where}: not a tokenizer: two tokens have one number")
    return Tokenizer(where, content, ids)


def joint_tokenizer_json(tokenizers: Sequence[Tokenizer], ids: Mapping[str, int]) -> bytes:
    """tokenizer.json of the first tokenizer with exactly the tokens of `ids`, under these numbers.

    Tokens that the first lacks come from the others: added tokens as they are; pieces of the model together with the
    merges or scores they have there. Raises UserError naming the part in which the tokenizers differ otherwise, and
    for one that is damaged.
    """
    try:
        return _joint_tokenizer_json(tokenizers, ids)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        of = " or ".join(one.where for one in tokenizers)
        raise UserError(f"{of}: not a tokenizer ({error!r}); fetch or write it again") from None


def _joint_tokenizer_json(tokenizers: Sequence[Tokenizer], ids: Mapping[str, int]) -> bytes:
    first = tokenizers[0]
    _check_content(first)
    content = copy.deepcopy(first.content)
    added = {one["content"]: one for one in first.content.get("added_tokens") or []}
    for other in tokenizers[1:]:
        for one in other.content.get("added_tokens") or []:
            if one["content"] not in first.ids:
                added.setdefault(one["content"], one)
    donors = [
        t for t in tokenizers[1:] if any(x in t.ids and x not in first.ids and x not in added for x in ids)
    ]
    for one in donors:
        _check_content(one)
        _check_alike(first, one)
    content["model"] = _model([first, *donors], ids)
    kept = [{**one, "id": ids[token]} for token, one in added.items() if token in ids]
    content["added_tokens"] = sorted(kept, key=lambda one: one["id"])
    if isinstance(content["model"]["vocab"], dict):
        # The library numbers added tokens behind the model's own, unless the model has them too.
        content["model"]["vocab"] |= {one["content"]: one["id"] for one in kept}
    _renumber(content.get("post_processor"), ids, first.where)
    if isinstance(content.get("padding"), dict):
        content["padding"]["pad_id"] = _number(content["padding"].get("pad_token"), ids, first.where)
    return json.dumps(content, ensure_ascii=False, indent=2).encode("utf-8")


def _check_content(tokenizer: Tokenizer) -> None:
    if not tokenizer.content:
        raise UserError(
            f"{tokenizer.where}: has no {FILE}, from which a joint one could be made; write it with transformers: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )


def _check_alike(first: Tokenizer, other: Tokenizer) -> None:
    if first.kind not in KINDS or first.kind != other.kind:
        raise UserError(
            f"{first.where} is {first.kind}, {other.where} {other.kind}: one tokenizer cannot be made of both; "
            "write vocabulary: intersect or pad"
        )
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if first.content.get(part) != other.content.get(part):
            raise UserError(
                f"{first.where} and {other.where} have another {part}: one tokenizer cannot be made of both; "
                "write vocabulary: intersect or pad"
            )


def _model(tokenizers: Sequence[Tokenizer], ids: Mapping[str, int]) -> dict[str, Any]:
    model: dict[str, Any] = copy.deepcopy(tokenizers[0].content["model"])
    if isinstance(model["vocab"], list):
        scores = {piece: score for t in reversed(tokenizers) for piece, score in t.content["model"]["vocab"]}
        ordered = sorted((token for token in scores if token in ids), key=lambda token: ids[token])
        if [ids[token] for token in ordered] != list(range(len(ordered))):
            raise UserError(
                f"{tokenizers[0].where}: its pieces are numbered by their places, and the joined tokens would leave "
                "gaps between them; write vocabulary: pad"
            )
        model["vocab"] = [[token, scores[token]] for token in ordered]
        if model.get("unk_id") is not None:
            unknown = tokenizers[0].content["model"]["vocab"][model["unk_id"]][0]
            model["unk_id"] = _number(unknown, ids, tokenizers[0].where)
        return model
    own = set(model["vocab"])
    held = {token for t in tokenizers for token in t.content["model"]["vocab"] if token in ids}
    model["vocab"] = {token: ids[token] for token in sorted(held, key=lambda token: ids[token])}
    if "merges" in model:
        merges: dict[tuple[str, str], Any] = {}
        for t in tokenizers:
            for merge in t.content["model"]["merges"]:
                left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
                # Others' merges make others' tokens: the first's own text is cut up as before.
                if {left, right, left + right} <= held and (t is tokenizers[0] or left + right not in own):
                    merges.setdefault((left, right), merge)
        model["merges"] = list(merges.values())
    return model


def _renumber(processor: Any, ids: Mapping[str, int], where: str) -> None:
    """New numbers in a post_processor, in place."""
    if not isinstance(processor, dict):
        return
    for inner in processor.get("processors") or []:
        _renumber(inner, ids, where)
    for name in ("sep", "cls"):
        if isinstance(processor.get(name), list):
            processor[name] = [processor[name][0], _number(processor[name][0], ids, where)]
    special = processor.get("special_tokens")
    for one in special.values() if isinstance(special, dict) else []:
        one["ids"] = [_number(token, ids, where) for token in one["tokens"]]


def _number(token: Any, ids: Mapping[str, int], where: str) -> int:
    if token not in ids:
        raise UserError(f"{where}: needs the token {token!r}, which the merged vocabulary has not")
    return ids[token]


def renumbered_companions(
    companions: Companions, tokenizer: Tokenizer, ids: Mapping[str, int], joined: bytes, rows: int
) -> dict[str, Path | bytes]:
    """Companions of weights whose tokens get new numbers: `joined` as tokenizer.json, and whatever names tokens.

    ids:  token -> number in the output.
    rows: of the output's embeddings.
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
    return _with_added(out, joined, tokenizer.where)


def _with_added(companions: Companions, joined: bytes, where: str) -> dict[str, Path | bytes]:
    """The tokens that tokenizer_config.json lists, where it does, are those of the joined tokenizer.json."""
    settings = companions.get("tokenizer_config.json")
    content = parse_json(read_companion(settings), where) if settings is not None else None
    if not isinstance(content, dict) or not isinstance(content.get("added_tokens_decoder"), dict):
        return dict(companions)
    content["added_tokens_decoder"] = {
        str(one["id"]): {key: value for key, value in one.items() if key not in ("id", "content")}
        | {"content": one["content"]}
        for one in json.loads(joined)["added_tokens"]
    }
    return {**companions, "tokenizer_config.json": as_json(content)}


def _renumber_settings(
    content: Any, by_number: Mapping[int, str], ids: Mapping[str, int], where: str, but: Any = None
) -> None:
    """`eos_token_id` and the like, wherever they stand, in place, except those that stand in `but` too."""
    if not isinstance(content, dict):
        return
    said = but if isinstance(but, dict) else {}
    for key, value in content.items():
        if isinstance(value, dict):
            _renumber_settings(value, by_number, ids, where, said.get(key))
        elif NUMBERED.search(key) and key not in said:
            many = value if isinstance(value, list) else [value]
            new = [
                _number(by_number[one], ids, where) if type(one) is int and one in by_number else one
                for one in many
            ]
            content[key] = new if isinstance(value, list) else new[0]


def with_tokenizer(
    companions: Companions,
    donor: Companions,
    joined: bytes | None,
    rows: int,
    where: str,
    moved: tuple[Tokenizer, Mapping[str, int]] | None = None,
) -> dict[str, Path | bytes]:
    """Companions of weights that get another's tokens: the donor's tokenizer (with `joined` in place of its own
    tokenizer.json), the numbers of special tokens as the donor's settings say them, and the rows in config.json.

    moved: their own tokenizer, and token -> number in the output: numbers that the donor does not say follow their
           tokens, and are left as they are without it. Raises UserError for a token that is not in the output.
    """
    out = {name: content for name, content in companions.items() if not is_tokenizer_file(name)}
    theirs = {name: content for name, content in donor.items() if is_tokenizer_file(name)}
    if joined is not None:
        theirs = {name: c for name, c in theirs.items() if name.startswith(("tokenizer_config", "special"))}
        theirs = _with_added(theirs, joined, where) | {FILE: joined}
    found: dict[str, Path | bytes] = {**out, **theirs}
    for name in ("config.json", "generation_config.json"):
        content = parse_json(read_companion(found[name]), f"{where}: {name}") if name in found else None
        if not isinstance(content, dict):
            continue
        if donor is not companions:
            said = parse_json(read_companion(donor[name]), name) if name in donor else {}
            if moved is not None:
                own = {number: token for token, number in moved[0].ids.items()}
                _renumber_settings(content, own, moved[1], f"{where}: {name}", said)
            content = _with_numbers(content, said)
        found[name] = as_json(
            adapted_config(content, {"vocab_size": rows}) if name == "config.json" else content
        )
    return found


def _with_numbers(content: dict[str, Any], donor: Any) -> dict[str, Any]:
    """`eos_token_id` and the like as the donor's settings say, here and in the same sections."""
    if not isinstance(donor, dict):
        return content
    out = dict(content)
    for key, value in content.items():
        if isinstance(value, dict):
            out[key] = _with_numbers(value, donor.get(key))
        elif NUMBERED.search(key) and key in donor:
            out[key] = donor[key]
    return out
