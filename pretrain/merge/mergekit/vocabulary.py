"""mergekit's tokenizer rules: remaps every embedding to the rows of one tokenizer, as mergekit 0.1.5 does.

If a model lacks a token, its row is that of the only model that has the token, else that of the base, else the mean
over the models that have it; zeros if none has it. Rows without a token are left out, unless the file pads the rows.
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

Means = dict[int, tuple[tuple[int, int], ...] | None]  # see RowMap.means


def remap_to_tokenizer(
    sources: Sequence[WeightSource],
    addresses: Sequence[str],
    base: str | None,
    tokens: TokenizerRule,
    first_and_last_models: tuple[Collection[str], Collection[str]],
) -> tuple[list[WeightSource], list[str]]:
    """The sources, their embeddings and heads remapped to the rows of one tokenizer; and notes.

    addresses: of the sources: first the base, if there is one; last, a model that only provides the tokenizer.
    base:      the file's base_model.
    first_and_last_models: addresses of the models whose embeddings are merged, and of those whose heads are merged.
    Raises UserError if a tokenizer cannot be read, or if a rule uses a row that does not exist.
    """
    # 1. The sources that take part: those with a vocabulary among the merged models.
    names = [vocabulary_names(source) for source in sources]
    merged = {*first_and_last_models[0], *first_and_last_models[1]}
    used = [i for i, found in enumerate(names) if found and addresses[i] in merged]
    if not used:
        return list(sources), []
    # 2. Their tokenizers, and the tokens of the output.
    tokenizers, notes = _read_tokenizers(sources, tokens)
    tokenizer_source = 0 if tokens.source in ("base", "union") else addresses.index(tokens.source)
    stored = [_rows(source, held) if held else math.inf for source, held in zip(sources, names, strict=True)]
    if tokens.source not in ("base", "union"):
        count = max(
            len(tokenizers[tokenizer_source].ids), stored[tokenizer_source] if names[tokenizer_source] else 0
        )
        _check_ids(sources[tokenizer_source], tokenizers[tokenizer_source], count)
    ids, joined = _vocabulary(tokens, tokenizers, tokenizer_source, stored)
    total = max(len(ids), max(ids.values(), default=-1) + 1)
    total += -total % tokens.multiple
    # 3. The row maps of the embeddings and of the heads; they differ if the first and last slice merge other
    #    models.
    check_row_types([sources[i] for i in used], [names[i] for i in used])
    counts = [int(stored[i]) for i in used]
    builders = [
        _RowMapBuilder(
            [tokenizers[i].ids for i in used],
            counts,
            [addresses[i] for i in used],
            base,
            tokens.rows,
            {place for place, i in enumerate(used) if addresses[i] in models},
        )
        for models in first_and_last_models
    ]
    # 4. The remapped sources, with the companions of the tokenizer's source.
    remapped = list(sources)
    owners = [sources[i] for i in used]
    differ = set(first_and_last_models[0]) != set(first_and_last_models[1])
    for place, i in enumerate(used):
        embedding = builders[0].row_map(place, ids, total)
        head = builders[1].row_map(place, ids, total) if differ else embedding
        rows = {name: embedding if is_embedding(name) else head for name in names[i]}
        companions = with_tokenizer(
            sources[i].companions, sources[tokenizer_source].companions, joined, total, sources[i].address
        )
        remapped[i] = RemappedSource(sources[i], owners, rows, companions, [], None)
    if any(count > total for count in counts):
        notes.append(f"rows beyond the {total} of the tokenizer are left out, as in mergekit")
    return remapped, notes


def _read_tokenizers(
    sources: Sequence[WeightSource], tokens: TokenizerRule
) -> tuple[list[Tokenizer], list[str]]:
    """The tokenizer of every source, that of the first source for those without one; and notes."""
    optional = [read_tokenizer(source.companions, source.address) for source in sources]
    first = optional[0]
    if first is None:
        raise UserError(
            f"{sources[0].address}: tokenizer_source: {tokens.source} needs a {FILE} beside the weights"
        )
    notes = [
        f"{source.address}: has no tokenizer; uses that of {sources[0].address}, as in mergekit"
        for source, tokenizer in zip(sources, optional, strict=True)
        if tokenizer is None
    ]
    return [tokenizer or first for tokenizer in optional], notes


def _check_ids(source: WeightSource, tokenizer: Tokenizer, rows: float) -> None:
    """Raises UserError if an id of the source's tokenizer is beyond its rows."""
    largest = max(tokenizer.ids.values(), default=0)
    if largest >= rows:
        raise UserError(
            f"{source.address}: tokenizer_source: a token has the id {largest:,}, beyond its {rows:,} rows; "
            "correct its tokenizer.json"
        )


def _vocabulary(
    tokens: TokenizerRule, tokenizers: Sequence[Tokenizer], tokenizer_source: int, rows: Sequence[float]
) -> tuple[dict[str, int], bytes | None]:
    """Return token -> row of the output, and its tokenizer.json (None: that of the source, unchanged).

    rows: embedding rows of every model. For `base` and `union`, mergekit drops tokens beyond these rows.
    """
    joint = tokens.source in ("base", "union")
    known = [
        {token: row for token, row in tokenizer.ids.items() if row < count or not joint}
        for tokenizer, count in zip(tokenizers, rows, strict=True)
    ]
    ids = dict(known[tokenizer_source])
    free = max(ids.values(), default=-1) + 1
    order = [tokenizers[tokenizer_source]]
    if tokens.source == "union":
        for tokenizer, theirs in zip(tokenizers[1:], known[1:], strict=True):
            additional = sorted(theirs.keys() - ids.keys(), key=lambda token: theirs[token])
            order += [tokenizer] if additional else []
            ids |= {token: free + place for place, token in enumerate(additional)}
            free += len(additional)
    fresh = [token for token in tokens.rows if token not in ids]
    if len(order) == 1 and not fresh and len(ids) == len(tokenizers[tokenizer_source].ids):
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
    """Builds the row map of each model; models are indexed by their position among those with embeddings."""

    def __init__(
        self,
        vocabularies: Sequence[Mapping[str, int]],
        counts: Sequence[int],
        addresses: Sequence[str],
        base: str | None,
        rules: Mapping[str, TokenRow],
        active: Collection[int],
    ) -> None:
        self._active = active
        # mergekit ignores tokens beyond the rows.
        self._ids = [
            {token: row for token, row in ids.items() if row < count}
            for ids, count in zip(vocabularies, counts, strict=True)
        ]
        self._counts, self._addresses, self._rules = counts, list(addresses), rules
        self._base = self._addresses.index(base) if base in self._addresses else None

    def row_map(self, place: int, ids: Mapping[str, int], total: int) -> RowMap:
        """For model `place`: which model and row each of the `total` output rows comes from (or which it averages)."""
        owner = np.full(total, MEAN, np.int64)
        row = np.zeros(total, np.int64)
        means: Means = dict.fromkeys(range(total))
        for token, number in ids.items():
            rule = self._rules.get(token)
            if token in self._ids[place] and not (rule is not None and rule.force):
                origins: tuple[tuple[int, int], ...] = ((place, self._ids[place][token]),)
            else:
                origins = self._origins(token, rule)
            if len(origins) == 1:
                owner[number], row[number] = origins[0]
                means.pop(number)
            else:
                means[number] = origins
        count = max(ids.values(), default=-1) + 1
        means |= {number: () for number in range(count) if number in means and means[number] is None}
        return RowMap.of(owner, row, means)

    def _origins(self, token: str, rule: TokenRow | None) -> tuple[tuple[int, int], ...]:
        """(model, row) pairs to average for a token that a model lacks or that a rule replaces."""
        if rule is not None:
            return self._rule_origin(token, rule)
        holders = [place for place in sorted(self._active) if token in self._ids[place]]
        if len(holders) > 1 and self._base in holders:
            holders = [self._base]
        return tuple((place, self._ids[place][token]) for place in holders)

    def _rule_origin(self, token: str, rule: TokenRow) -> tuple[tuple[int, int], ...]:
        if rule.model is None:
            return ()
        if rule.model not in self._addresses:
            raise UserError(f"tokenizer: {token}: {rule.model} is not one of the merged models")
        place = self._addresses.index(rule.model)
        if place not in self._active:
            raise UserError(
                f"tokenizer: {token}: {rule.model} does not contribute to the merged embeddings or heads"
            )
        origin = token if rule.row is None else rule.row
        row = origin if isinstance(origin, int) else self._ids[place].get(origin, -1)
        if not 0 <= row < self._counts[place]:
            raise UserError(f"tokenizer: {token}: {rule.model} has no token {origin!r}")
        return ((place, row),)


def _rows(source: WeightSource, names: Sequence[str]) -> int:
    """Rows of the shortest of the tensors `names`."""
    return min(source.info(stored_name(source, name))[1][0] for name in names)
