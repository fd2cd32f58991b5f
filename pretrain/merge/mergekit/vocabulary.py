"""mergekit's tokenizer rules: every embedding brought to the rows of one tokenizer, as mergekit 0.1.5 does it.

A row that a model lacks is that of the one model that has the token, else the base's, else the mean of those that have
it; zeros where none has. Rows that no token has are left out, unless the file pads them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from data_pipeline.errors import UserError
from pretrain.merge.mergekit.tokens import TokenizerRule, TokenRow
from pretrain.merge.vocabulary.align import check_row_types, is_embedding, vocabulary_names
from pretrain.merge.vocabulary.remapped_source import MEAN, RemappedSource, RowMap, stored_name
from pretrain.merge.vocabulary.tokenizer_json import (
    FILE,
    Tokenizer,
    joint_tokenizer_json,
    read_tokenizer,
    with_tokenizer,
)
from pretrain.weights.source import WeightSource

Places = dict[int, tuple[tuple[int, int], ...] | None]


def remap_to_tokenizer(
    sources: Sequence[WeightSource],
    addresses: Sequence[str],
    base: str | None,
    tokens: TokenizerRule,
    ends: tuple[Collection[str], Collection[str]],
) -> tuple[list[WeightSource], list[str]]:
    """The sources that have embeddings as views with the rows of one tokenizer, and notes.

    addresses: of the sources, the base first where there is one; one that is only the tokenizer's source is last.
    base:      the file's base_model.
    ends:      addresses of the models whose embeddings, and of those whose heads, are merged.
    Raises UserError where a tokenizer cannot be read, or a token's row is asked for that is not there.
    """
    names = [vocabulary_names(source) for source in sources]
    merged = {*ends[0], *ends[1]}
    taking = [i for i, found in enumerate(names) if found and addresses[i] in merged]
    if not taking:
        return list(sources), []
    found = [read_tokenizer(source.companions, source.address) for source in sources]
    first = found[0]
    if first is None:
        raise UserError(
            f"{sources[0].address}: tokenizer_source: {tokens.source} needs a {FILE} beside the weights"
        )
    notes = [
        f"{source.address}: no tokenizer beside it; taken to have that of {sources[0].address}, as mergekit does"
        for source, one in zip(sources, found, strict=True)
        if one is None
    ]
    tokenizers = [one or first for one in found]
    donor = 0 if tokens.source in ("base", "union") else addresses.index(tokens.source)
    stored = [_rows(source, held) if held else math.inf for source, held in zip(sources, names, strict=True)]
    held = max(len(tokenizers[donor].ids), stored[donor] if names[donor] else 0)
    if (
        tokens.source not in ("base", "union")
        and (far := max(tokenizers[donor].ids.values(), default=0)) >= held
    ):
        raise UserError(
            f"{sources[donor].address}: tokenizer_source: a token has the number {far:,}, beyond its {held:,} rows; "
            "mend its tokenizer.json"
        )
    ids, joined = _vocabulary(tokens, tokenizers, donor, stored)
    total = max(len(ids), max(ids.values(), default=-1) + 1)
    total += -total % tokens.multiple
    check_row_types([sources[i] for i in taking], [names[i] for i in taking])
    rows_in = [int(stored[i]) for i in taking]
    makers = [
        _RowMapBuilder(
            [tokenizers[i].ids for i in taking],
            rows_in,
            [addresses[i] for i in taking],
            base,
            tokens.rows,
            {place for place, i in enumerate(taking) if addresses[i] in end},
        )
        for end in ends
    ]
    views = list(sources)
    made_of = [sources[i] for i in taking]
    for place, i in enumerate(taking):
        before = makers[0].rows(place, ids, total)
        after = makers[1].rows(place, ids, total) if set(ends[0]) != set(ends[1]) else before
        rows = {name: before if is_embedding(name) else after for name in names[i]}
        companions = with_tokenizer(
            sources[i].companions, sources[donor].companions, joined, total, sources[i].address
        )
        views[i] = RemappedSource(sources[i], made_of, rows, companions, [], None)
    if any(count > total for count in rows_in):
        notes.append(f"rows beyond the {total} of the tokenizer are left out, as mergekit does")
    return views, notes


def _vocabulary(
    tokens: TokenizerRule, tokenizers: Sequence[Tokenizer], donor: int, rows: Sequence[float]
) -> tuple[dict[str, int], bytes | None]:
    """Token -> row of the output; and its tokenizer.json, None where it is the donor's.

    rows: of every model's embeddings. From `base` and from a `union` mergekit strips the tokens beyond them.
    """
    joint = tokens.source in ("base", "union")
    known = [
        {token: row for token, row in one.ids.items() if row < count or not joint}
        for one, count in zip(tokenizers, rows, strict=True)
    ]
    ids = dict(known[donor])
    free = max(ids.values(), default=-1) + 1
    order = [tokenizers[donor]]
    if tokens.source == "union":
        for one, theirs in zip(tokenizers[1:], known[1:], strict=True):
            more = sorted(theirs.keys() - ids.keys(), key=lambda token: theirs[token])
            order += [one] if more else []
            ids |= {token: free + place for place, token in enumerate(more)}
            free += len(more)
    fresh = [token for token in tokens.rows if token not in ids]
    if len(order) == 1 and not fresh and len(ids) == len(tokenizers[donor].ids):
        return ids, None
    content = json.loads(joint_tokenizer_json(order, ids))
    for number, token in enumerate(fresh, free):
        ids[token] = number
        added = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
        content["added_tokens"].append({"id": ids[token], "content": token, **added, "normalized": True})
        if isinstance(content["model"]["vocab"], dict):
            content["model"]["vocab"][token] = ids[token]
    return ids, json.dumps(content, ensure_ascii=False, indent=2).encode("utf-8")


class _RowMapBuilder:
    """Where rows come from, model by model, all given by their place among those that have embeddings."""

    def __init__(
        self,
        vocabularies: Sequence[Mapping[str, int]],
        counts: Sequence[int],
        addresses: Sequence[str],
        base: str | None,
        asked: Mapping[str, TokenRow],
        active: Collection[int],
    ) -> None:
        self._active = active
        # mergekit does not see tokens beyond the rows.
        self._have = [
            {token: row for token, row in ids.items() if row < count}
            for ids, count in zip(vocabularies, counts, strict=True)
        ]
        self._counts, self._addresses, self._asked = counts, list(addresses), asked
        self._base = self._addresses.index(base) if base in self._addresses else None

    def rows(self, place: int, ids: Mapping[str, int], total: int) -> RowMap:
        owner = np.full(total, MEAN, np.int64)
        row = np.zeros(total, np.int64)
        made: Places = dict.fromkeys(range(total))
        for token, number in ids.items():
            asked = self._asked.get(token)
            if token in self._have[place] and not (asked is not None and asked.force):
                found: tuple[tuple[int, int], ...] = ((place, self._have[place][token]),)
            else:
                found = self._default(token, asked)
            if len(found) == 1:
                owner[number], row[number] = found[0]
                made.pop(number)
            else:
                made[number] = found
        count = max(ids.values(), default=-1) + 1
        made |= {number: () for number in range(count) if number in made and made[number] is None}
        return RowMap.of(owner, row, made)

    def _default(self, token: str, asked: TokenRow | None) -> tuple[tuple[int, int], ...]:
        """Of a token that a model lacks, or that is taken from elsewhere in every model."""
        if asked is not None:
            return self._asked_row(token, asked)
        holders = [place for place in sorted(self._active) if token in self._have[place]]
        if len(holders) > 1 and self._base in holders:
            holders = [self._base]
        return tuple((place, self._have[place][token]) for place in holders)

    def _asked_row(self, token: str, asked: TokenRow) -> tuple[tuple[int, int], ...]:
        if asked.model is None:
            return ()
        if asked.model not in self._addresses:
            raise UserError(f"tokenizer: {token}: {asked.model} is none of the models that are merged")
        place = self._addresses.index(asked.model)
        if place not in self._active:
            raise UserError(
                f"tokenizer: {token}: {asked.model} is not merged where the embeddings or heads are"
            )
        wanted = token if asked.row is None else asked.row
        row = wanted if isinstance(wanted, int) else self._have[place].get(wanted, -1)
        if not 0 <= row < self._counts[place]:
            raise UserError(f"tokenizer: {token}: {asked.model} has no token {wanted!r}")
        return ((place, row),)


def _rows(source: WeightSource, names: Sequence[str]) -> int:
    return min(source.info(stored_name(source, name))[1][0] for name in names)
