"""Inputs with different vocabularies: refused, or remapped to the same embedding rows.

The rules are first, union, intersect (token by token) and pad (row by row).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from pretrain.merge.merge_plan import letter
from pretrain.merge.vocabulary.named_tokens import tokens_beyond
from pretrain.merge.vocabulary.remapped_source import RemappedSource, RowMap, stored_name
from pretrain.merge.vocabulary.tokenizer_json import (
    FILE,
    STALE,
    Tokenizer,
    is_tokenizer_file,
    joint_tokenizer_json,
    read_tokenizer,
    renumbered_companions,
    with_tokenizer,
)
from pretrain.weights.companions import adapted_config, as_json, read_companion
from pretrain.weights.dtypes import TensorInfo
from pretrain.weights.folder import parse_json
from pretrain.weights.source import WeightSource

RULES = ("first", "intersect", "pad", "union")
EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings?|embed_in|token_embedding|tok_embeddings|shared)\.weight$"
    r"|(^|\.)(backbone|rwkv)\.embeddings\.weight$"
)
HEAD = re.compile(
    r"(^|\.)(lm_head|generator_lm_head|lm_loss|head|embed_out|output|output_layer|proj_out|decoder|predictions)"
    r"\.(weight|bias)$"
)
ADVICE = (
    "choose a rule with --vocabulary (in a spec, vocabulary): first (the tokens of the first input; other inputs use "
    "the first input's row for tokens that they lack), intersect (tokens that all inputs have), union (tokens of any "
    "input; an input that lacks a token uses the row of one that has it) or pad (row by row; shorter embeddings use "
    "the missing rows of the longest)"
)


class VocabularyMismatch(UserError):
    """Inputs of different vocabularies and no rule. `difference` is the message without the advice."""

    def __init__(self, difference: str) -> None:
        super().__init__(f"{difference}; {ADVICE}")
        self.difference = difference


def aligned(
    sources: Sequence[WeightSource], rule: str | None, mixed: Callable[[str], bool] = bool
) -> list[WeightSource]:
    """The sources; those with embeddings are remapped to the same rows under `rule`.

    `first` (tokens, ids and tokenizer of the first source), `intersect` (in the order of the first source) and `union`
    (the tokens of the first source, then the additional ones of each other source in its order) work token by token
    and need a tokenizer beside every source. `pad` works row by row. Sources without embeddings are returned unchanged.

    Raises VocabularyMismatch if there is no rule, numbers of rows or tokenizers differ, and one of these tensors is
    `mixed`; UserError if the rule cannot be applied.
    """
    if rule is not None and rule not in RULES:
        raise UserError(f"vocabulary: unknown rule {rule!r}; choose one of {', '.join(RULES)}")
    names = [vocabulary_names(source) for source in sources]
    with_vocabulary = [i for i, found in enumerate(names) if found]
    if len(with_vocabulary) < 2:
        return list(sources)
    chosen = [sources[i] for i in with_vocabulary]
    rows = [_rows_of(source, names[i], rule) for i, source in zip(with_vocabulary, chosen, strict=True)]
    files = {_tokenizer_bytes(source) for source in chosen}
    if len(set(rows)) == len(files) == 1 and None not in files:
        return list(sources)
    tokenizers = [read_tokenizer(source.companions, source.address) for source in chosen]
    known = [t for t in tokenizers if t is not None]
    differ = any(t.contradicts(known[0]) or (rule and t.ids != known[0].ids) for t in known[1:])
    by_token = rule not in (None, "pad")  # needs the tokens of every source
    if len(set(rows)) == 1 and not differ and not (by_token and None in tokenizers):
        return list(sources)
    if rule is None:
        shared = {
            name
            for i in with_vocabulary
            for j in with_vocabulary
            if i < j
            for name in {*names[i]} & {*names[j]}
        }
        # Tensors of different names are never mixed; the planner reports them.
        if not any(map(mixed, shared)):
            return list(sources)
        raise VocabularyMismatch(_difference(with_vocabulary, chosen, rows, tokenizers))
    check_row_types(chosen, [names[i] for i in with_vocabulary])
    remappings = (
        _pad(chosen, rows, tokenizers) if rule == "pad" else _by_token(chosen, rows, tokenizers, rule)
    )
    unrecognised = _note_unrecognised_tensors(chosen, rows, {name for found in names for name in found})
    remapped = list(sources)
    for place, i in enumerate(with_vocabulary):
        row_map, companions, notes, config_error = remappings[place]
        notes = [*notes, *unrecognised]
        remapped[i] = RemappedSource(
            sources[i], chosen, dict.fromkeys(names[i], row_map), companions, notes, config_error
        )
    return remapped


def _note_unrecognised_tensors(
    sources: Sequence[WeightSource], rows: Sequence[int], known: set[str]
) -> list[str]:
    """A note about tensors that are as long as the vocabulary in every source but have no known embedding name.

    No note if embeddings are as wide as they are long, because then too many tensors match.
    """
    shapes = [{name: source.info(name)[1] for name in source.names()} for source in sources]
    if any(
        n in by_name[name][1:]
        for by_name, n in zip(shapes, rows, strict=True)
        for name in known & by_name.keys()
    ):
        return []
    unrecognised = [
        name
        for name in shapes[0]
        if name not in known
        and all(n in by_name.get(name, ()) for by_name, n in zip(shapes, rows, strict=True))
    ]
    if not unrecognised:
        return []
    more = f" and {len(unrecognised) - 3} more" if len(unrecognised) > 3 else ""
    return [
        f"{', '.join(unrecognised[:3])}{more}: as long as the vocabulary, but not a known name of an embedding or "
        "head; its rows are not remapped"
    ]


def tokens_without_rows(
    companions: Mapping[str, Path | bytes], infos: Mapping[str, TensorInfo], where: str
) -> str | None:
    """What is wrong if tokens beside a model with the tensors `infos` have no embedding row; None if all have one.

    None, too, without a tokenizer, and for models with several embeddings of different lengths.
    """
    rows = {shape[0] for name, (_, shape) in infos.items() if is_embedding(name) and len(shape) == 2}
    if len(rows) != 1:
        return None
    files = {name: read_companion(content) for name, content in companions.items() if is_tokenizer_file(name)}
    return _tokens_beyond(tuple(sorted(files.items())), rows.pop(), where)


@lru_cache(maxsize=2)  # a sweep asks for every beta, and tokenizer.json has megabytes
def _tokens_beyond(files: tuple[tuple[str, bytes], ...], rows: int, where: str) -> str | None:
    tokenizer = read_tokenizer(dict(files), where)
    return None if tokenizer is None else tokens_beyond(dict(files), tokenizer.ids, rows, where)


def is_embedding(name: str) -> bool:
    """True if the name is that of an input embedding."""
    return EMBEDDING.search(name) is not None


def is_vocabulary(name: str) -> bool:
    """True if the name is that of an embedding or head, which has one row per token."""
    return is_embedding(name) or HEAD.search(name) is not None


def vocabulary_names(source: WeightSource) -> list[str]:
    """Names of the tensors with one row per token: embeddings, and heads with as many rows."""
    stored = source.names()
    embeddings = [name for name in stored if is_embedding(name) and len(source.info(name)[1]) == 2]
    rows = {source.info(name)[1][0] for name in embeddings}
    heads = [n for n in stored if HEAD.search(n) and source.info(n)[1][:1] and source.info(n)[1][0] in rows]
    return embeddings + [name for name in heads if name not in embeddings]


def _rows_of(source: WeightSource, names: Sequence[str], rule: str | None) -> int:
    """Number of embedding rows; without a rule, that of the first embedding if the source has several vocabularies."""
    counts = [source.info(name)[1][0] for name in names]
    if rule is not None and len(set(counts)) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
        raise UserError(
            f"{source.address}: its embeddings have different numbers of rows ({listed}), so it has no single "
            f"vocabulary; leave out vocabulary: {rule} to merge row by row, if all inputs have equal numbers of rows"
        )
    return counts[0]


def _tokenizer_bytes(source: WeightSource) -> bytes | None:
    companion = source.companions.get(FILE)
    return None if companion is None else read_companion(companion)


def _difference(
    with_vocabulary: Sequence[int],
    sources: Sequence[WeightSource],
    rows: Sequence[int],
    tokenizers: Sequence[Tokenizer | None],
) -> str:
    parts = []
    for i, source, count, tokenizer in zip(with_vocabulary, sources, rows, tokenizers, strict=True):
        tokens = f", {len(tokenizer.ids)} tokens" if tokenizer is not None else ""
        parts.append(f"{letter(i)} ({source.address}) {count} rows{tokens}")
    known = [t for t in tokenizers if t is not None]
    note = ""
    if len(known) > 1:
        extra = sorted(set(known[1].ids) ^ set(known[0].ids))[:3]
        moved = [t for t, n in known[0].ids.items() if known[1].ids.get(t, n) != n][:3]
        note = f"; only one of them has {', '.join(map(repr, extra))}" if extra else ""
        note += f"; different ids for {', '.join(map(repr, moved))}" if moved else ""
    return f"the vocabularies differ: {'; '.join(parts)}{note}"


def check_row_types(sources: Sequence[WeightSource], names: Sequence[Sequence[str]]) -> None:
    """Raises UserError unless all sources have the tensors `names` with equal row width and dtype."""
    for name in dict.fromkeys(name for found in names for name in found):
        for source in sources:
            if stored_name(source, name) not in source.names():
                raise UserError(
                    f"{name}: missing in {source.address}; a vocabulary rule needs it in all inputs"
                )
        infos = [source.info(stored_name(source, name)) for source in sources]
        if len({(dtype, shape[1:]) for dtype, shape in infos}) > 1:
            listed = ", ".join(
                f"{d} {list(s)} in {x.address}" for (d, s), x in zip(infos, sources, strict=True)
            )
            raise UserError(f"{name}: a vocabulary rule needs rows of one width and dtype: {listed}")


# Row map, companions, notes, and the reason why an output cannot use the companions (None if it can).
Remapping = tuple[RowMap, dict[str, Path | bytes], list[str], str | None]


def _pad(
    sources: Sequence[WeightSource], rows: Sequence[int], tokenizers: Sequence[Tokenizer | None]
) -> list[Remapping]:
    known = [t for t in tokenizers if t is not None]
    for tokenizer in known[1:]:
        at = {number: token for token, number in known[0].ids.items()}
        wrong = next(((t, n) for t, n in tokenizer.ids.items() if at.get(n, t) != t), None)
        if wrong:
            raise UserError(
                f"row {wrong[1]} is {at[wrong[1]]!r} in {known[0].where}, {wrong[0]!r} in {tokenizer.where}: rows of "
                "different tokens cannot be mixed; write vocabulary: union or intersect"
            )
    longest = max(range(len(rows)), key=lambda i: rows[i])  # the first one on a tie
    total = rows[longest]
    counts = [len(t.ids) if t is not None else 0 for t in tokenizers]
    largest = max(range(len(counts)), key=lambda i: counts[i])
    remappings: list[Remapping] = []
    for i, source in enumerate(sources):
        owner = np.where(np.arange(total) < rows[i], i, longest)
        companions = dict(source.companions)
        notes = []
        if counts[i] < counts[largest]:
            other = sources[largest]
            theirs = ("tokenizer", "special_tokens_map", *STALE)
            companions = {n: c for n, c in companions.items() if not n.startswith(theirs)}
            companions |= {n: c for n, c in other.companions.items() if n.startswith(theirs)}
            notes.append(f"uses the tokenizer of {other.address}, which has the most tokens")
        if "config.json" in companions:
            config = parse_json(read_companion(companions["config.json"]), f"{source.address}: config.json")
            companions["config.json"] = as_json(adapted_config(config, {"vocab_size": total}))
        remappings.append((RowMap.of(owner, np.arange(total)), companions, notes, None))
    return remappings


def _by_token(
    sources: Sequence[WeightSource], rows: Sequence[int], optional: Sequence[Tokenizer | None], rule: str
) -> list[Remapping]:
    tokenizers = [_required(t, source, rule) for t, source in zip(optional, sources, strict=True)]
    for tokenizer, count in zip(tokenizers, rows, strict=True):
        if max(tokenizer.ids.values(), default=-1) >= count:
            raise UserError(f"{tokenizer.where}: has token ids beyond the {count} rows of its embeddings")
    ids, total = _joint_ids(tokenizers, rows, rule)
    joined = joint_tokenizer_json(tokenizers, ids) if rule != "first" else b""
    holder = {t: next(k for k, tokenizer in enumerate(tokenizers) if t in tokenizer.ids) for t in ids}
    remappings: list[Remapping] = []
    for i, (source, tokenizer) in enumerate(zip(sources, tokenizers, strict=True)):
        # Rows without a token come from the first source (its padding).
        owner, row = np.zeros(total, np.int64), np.minimum(np.arange(total), rows[0] - 1)
        for token, number in ids.items():
            origin = i if token in tokenizer.ids else holder[token]
            owner[number], row[number] = origin, tokenizers[origin].ids[token]
        companions: dict[str, Path | bytes]
        config_error = None
        if rule == "first":
            notes = [f"uses the tokenizer of {sources[0].address}"] if i else []
            donor = sources[0].companions
            companions = dict(donor)
            try:
                companions = with_tokenizer(
                    source.companions, donor, None, total, source.address, (tokenizer, ids)
                )
            except UserError as error:  # only matters if the output uses this config
                config_error = str(error)
            remappings.append((RowMap.of(owner, row), companions, notes, config_error))
            continue
        companions = {FILE: joined}
        try:
            companions = renumbered_companions(source.companions, tokenizer, ids, joined, total)
        except UserError as error:  # only matters if the output uses this config
            config_error = str(error)
        stale = [name for name in source.companions if name in STALE]
        notes = (
            [f"{', '.join(stale)} of {source.address} left out: tokenizer.json replaces them"]
            if stale
            else []
        )
        remappings.append((RowMap.of(owner, row), companions, notes, config_error))
    return remappings


def _joint_ids(tokenizers: Sequence[Tokenizer], rows: Sequence[int], rule: str) -> tuple[dict[str, int], int]:
    """The ids of the tokens of the output, and its number of rows. Raises UserError if no token is left."""
    first = tokenizers[0].ids
    if rule == "intersect":
        common = [
            t
            for t in sorted(first, key=lambda t: first[t])
            if all(t in tokenizer.ids for tokenizer in tokenizers)
        ]
        ids = {token: number for number, token in enumerate(common)}
        total = len(ids)
        if not common:
            raise UserError("vocabulary: intersect: the tokenizers have no token in common")
    elif rule == "first":
        ids, total = dict(first), rows[0]
    else:
        ids = dict(first)
        free = max(ids.values(), default=-1) + 1
        for theirs in (tokenizer.ids for tokenizer in tokenizers[1:]):
            extra = [token for token in sorted(theirs, key=lambda t: theirs[t]) if token not in ids]
            ids |= {token: free + place for place, token in enumerate(extra)}
            free += len(extra)
        total = max(rows[0], free)
    return ids, total


def _required(tokenizer: Tokenizer | None, source: WeightSource, rule: str) -> Tokenizer:
    if tokenizer is None:
        raise UserError(
            f"{source.address}: vocabulary: {rule} works token by token and needs a {FILE} beside the weights "
            "(transformers writes it: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR))"
        )
    return tokenizer
