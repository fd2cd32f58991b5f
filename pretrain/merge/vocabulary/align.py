"""Models whose vocabularies differ: refused, or their embeddings seen through views that have the same rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from pretrain.merge.merge_plan import letter
from pretrain.merge.vocabulary.remapped_source import RemappedSource, RowMap, stored_name
from pretrain.merge.vocabulary.tokenizer_json import (
    FILE,
    STALE,
    Tokenizer,
    joint_tokenizer_json,
    read_tokenizer,
    renumbered_companions,
    with_tokenizer,
)
from pretrain.weights.companions import adapted_config, as_json, read_companion
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
    "say how with --vocabulary (in a spec, vocabulary): first (the first input's tokens; one that another lacks takes "
    "the first's row), intersect (tokens that all have), union (a token that one has takes its row) or pad (rows by "
    "their numbers, the shorter padded from the longer)"
)


def aligned(
    sources: Sequence[WeightSource], rule: str | None, mixed: Callable[[str], bool] = bool
) -> list[WeightSource]:
    """The sources, those with embeddings as views that have the same rows under `rule`.

    Token by token for `first` (its tokens, numbers and tokenizer), `intersect` (the order of the first source) and
    `union` (the first source's tokens, then what each other has more, in its order), which need a tokenizer beside
    every source; row by row for `pad`. Without a rule, UserError when rows or tokenizers differ and one of these
    tensors is `mixed`. Sources without embeddings stay as they are.
    """
    if rule is not None and rule not in RULES:
        raise UserError(f"vocabulary: {rule!r} is none of {', '.join(RULES)}")
    names = [vocabulary_names(source) for source in sources]
    taking = [i for i, found in enumerate(names) if found]
    if len(taking) < 2:
        return list(sources)
    chosen = [sources[i] for i in taking]
    rows = [_rows_of(source, names[i], rule) for i, source in zip(taking, chosen, strict=True)]
    files = {_raw(source) for source in chosen}
    if len(set(rows)) == len(files) == 1 and None not in files:
        return list(sources)
    tokenizers = [read_tokenizer(source.companions, source.address) for source in chosen]
    known = [t for t in tokenizers if t is not None]
    differ = any(t.contradicts(known[0]) or (rule and t.ids != known[0].ids) for t in known[1:])
    by_token = rule not in (None, "pad")  # which needs to know every source's tokens
    if len(set(rows)) == 1 and not differ and not (by_token and None in tokenizers):
        return list(sources)
    if rule is None:
        shared = {name for i in taking for j in taking if i < j for name in {*names[i]} & {*names[j]}}
        if not any(map(mixed, shared)):  # those of other names are never mixed: the planner lists them
            return list(sources)
        raise UserError(_difference(taking, chosen, rows, tokenizers))
    check_row_types(chosen, [names[i] for i in taking])
    made = _pad(chosen, rows, tokenizers) if rule == "pad" else _by_token(chosen, rows, tokenizers, rule)
    unknown = _unknown(chosen, rows, {name for found in names for name in found})
    views = list(sources)
    for place, i in enumerate(taking):
        moved, companions, notes, config_error = made[place]
        notes = [*notes, *unknown]
        views[i] = RemappedSource(
            sources[i], chosen, dict.fromkeys(names[i], moved), companions, notes, config_error
        )
    return views


def _unknown(sources: Sequence[WeightSource], rows: Sequence[int], known: set[str]) -> list[str]:
    """A note of tensors that are as long as the vocabulary in every source, and have no name that says so; none where
    embeddings are as wide as they are long, as then too many are."""
    shapes = [{name: source.info(name)[1] for name in source.names()} for source in sources]
    if any(n in held[name][1:] for held, n in zip(shapes, rows, strict=True) for name in known & held.keys()):
        return []
    found = [
        name
        for name in shapes[0]
        if name not in known and all(n in held.get(name, ()) for held, n in zip(shapes, rows, strict=True))
    ]
    if not found:
        return []
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return [
        f"{', '.join(found[:3])}{more}: as long as the vocabulary, and of no name that is known to go by token: left "
        "in the order that they have"
    ]


def is_embedding(name: str) -> bool:
    """Whether a tensor of that name is the input's; else it may be the output's."""
    return EMBEDDING.search(name) is not None


def is_vocabulary(name: str) -> bool:
    """Whether a tensor of that name most likely has a row for every token."""
    return is_embedding(name) or HEAD.search(name) is not None


def vocabulary_names(source: WeightSource) -> list[str]:
    """Tensors with a row for every token: embeddings, and heads that have as many rows."""
    held = source.names()
    embeddings = [name for name in held if is_embedding(name) and len(source.info(name)[1]) == 2]
    rows = {source.info(name)[1][0] for name in embeddings}
    heads = [n for n in held if HEAD.search(n) and source.info(n)[1][:1] and source.info(n)[1][0] in rows]
    return embeddings + [name for name in heads if name not in embeddings]


def _rows_of(source: WeightSource, names: Sequence[str], rule: str | None) -> int:
    """Rows of its embeddings; of the first, where it has several vocabularies and no rule is to join them."""
    counts = [source.info(name)[1][0] for name in names]
    if rule is not None and len(set(counts)) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
        raise UserError(
            f"{source.address}: its embeddings have different numbers of rows, {listed}, so there is no one "
            f"vocabulary to join; without vocabulary: {rule} they are merged row by row, where all have as many"
        )
    return counts[0]


def _raw(source: WeightSource) -> bytes | None:
    companion = source.companions.get(FILE)
    return None if companion is None else read_companion(companion)


def _difference(
    taking: Sequence[int],
    sources: Sequence[WeightSource],
    rows: Sequence[int],
    tokenizers: Sequence[Tokenizer | None],
) -> str:
    said = []
    for i, source, count, tokenizer in zip(taking, sources, rows, tokenizers, strict=True):
        tokens = f", {len(tokenizer.ids)} tokens" if tokenizer is not None else ""
        said.append(f"{letter(i)} ({source.address}) {count} rows{tokens}")
    known = [t for t in tokenizers if t is not None]
    note = ""
    if len(known) > 1:
        extra = sorted(set(known[1].ids) ^ set(known[0].ids))[:3]
        moved = [t for t, n in known[0].ids.items() if known[1].ids.get(t, n) != n][:3]
        note = f"; only one has {', '.join(map(repr, extra))}" if extra else ""
        note += f"; other numbers for {', '.join(map(repr, moved))}" if moved else ""
    return f"the vocabularies differ: {'; '.join(said)}{note}; {ADVICE}"


def check_row_types(sources: Sequence[WeightSource], names: Sequence[Sequence[str]]) -> None:
    """Rows of one source are read in another's place: they must be as wide and of the same type."""
    for name in dict.fromkeys(name for found in names for name in found):
        for source in sources:
            if stored_name(source, name) not in source.names():
                raise UserError(
                    f"{name}: missing in {source.address}; under a vocabulary rule all must have it"
                )
        infos = [source.info(stored_name(source, name)) for source in sources]
        if len({(dtype, shape[1:]) for dtype, shape in infos}) > 1:
            listed = ", ".join(
                f"{d} {list(s)} in {x.address}" for (d, s), x in zip(infos, sources, strict=True)
            )
            raise UserError(f"{name}: under a vocabulary rule rows must be of one width and dtype: {listed}")


Made = tuple[RowMap, dict[str, Path | bytes], list[str], str | None]
"""rows, companions, notes, and why the companions cannot be those of the output"""


def _pad(
    sources: Sequence[WeightSource], rows: Sequence[int], tokenizers: Sequence[Tokenizer | None]
) -> list[Made]:
    known = [t for t in tokenizers if t is not None]
    for one in known[1:]:
        at = {number: token for token, number in known[0].ids.items()}
        wrong = next(((t, n) for t, n in one.ids.items() if at.get(n, t) != t), None)
        if wrong:
            raise UserError(
                f"row {wrong[1]} is {at[wrong[1]]!r} in {known[0].where}, {wrong[0]!r} in {one.where}: rows of other "
                "tokens cannot be mixed; write vocabulary: union or intersect"
            )
    longest = max(range(len(rows)), key=lambda i: rows[i])  # the first of the longest
    total = rows[longest]
    counts = [len(t.ids) if t is not None else 0 for t in tokenizers]
    largest = max(range(len(counts)), key=lambda i: counts[i])
    made: list[Made] = []
    for i, source in enumerate(sources):
        owner = np.where(np.arange(total) < rows[i], i, longest)
        companions = dict(source.companions)
        notes = []
        if counts[i] < counts[largest]:
            other = sources[largest]
            theirs = ("tokenizer", "special_tokens_map", *STALE)
            companions = {n: c for n, c in companions.items() if not n.startswith(theirs)}
            companions |= {n: c for n, c in other.companions.items() if n.startswith(theirs)}
            notes.append(f"the tokenizer is that of {other.address}, which has the most tokens")
        if "config.json" in companions:
            config = parse_json(read_companion(companions["config.json"]), f"{source.address}: config.json")
            companions["config.json"] = as_json(adapted_config(config, {"vocab_size": total}))
        made.append((RowMap.of(owner, np.arange(total)), companions, notes, None))
    return made


def _by_token(
    sources: Sequence[WeightSource], rows: Sequence[int], found: Sequence[Tokenizer | None], rule: str
) -> list[Made]:
    tokenizers = [_needed(t, source, rule) for t, source in zip(found, sources, strict=True)]
    for tokenizer, count in zip(tokenizers, rows, strict=True):
        if max(tokenizer.ids.values(), default=-1) >= count:
            raise UserError(f"{tokenizer.where}: has tokens beyond the {count} rows of its embeddings")
    first = tokenizers[0].ids
    if rule == "intersect":
        common = [t for t in sorted(first, key=lambda t: first[t]) if all(t in one.ids for one in tokenizers)]
        ids = {token: number for number, token in enumerate(common)}
        total = len(ids)
        if not common:
            raise UserError("vocabulary: intersect: the tokenizers have no token in common")
    elif rule == "first":
        ids, total = dict(first), rows[0]
    else:
        ids = dict(first)
        free = max(ids.values(), default=-1) + 1
        for theirs in (one.ids for one in tokenizers[1:]):
            extra = [token for token in sorted(theirs, key=lambda t: theirs[t]) if token not in ids]
            ids |= {token: free + place for place, token in enumerate(extra)}
            free += len(extra)
        total = max(rows[0], free)
    joined = joint_tokenizer_json(tokenizers, ids) if rule != "first" else b""
    holder = {t: next(k for k, one in enumerate(tokenizers) if t in one.ids) for t in ids}
    made: list[Made] = []
    for i, (source, tokenizer) in enumerate(zip(sources, tokenizers, strict=True)):
        # Rows that no token has are the padding of the first source.
        owner, row = np.zeros(total, np.int64), np.minimum(np.arange(total), rows[0] - 1)
        for token, number in ids.items():
            from_whom = i if token in tokenizer.ids else holder[token]
            owner[number], row[number] = from_whom, tokenizers[from_whom].ids[token]
        companions: dict[str, Path | bytes]
        config_error = None
        if rule == "first":
            notes = [f"the tokenizer is that of {sources[0].address}"] if i else []
            donor = sources[0].companions
            companions = dict(donor)
            try:
                companions = with_tokenizer(
                    source.companions, donor, None, total, source.address, (tokenizer, ids)
                )
            except UserError as error:  # matters only where the output is to have this config
                config_error = str(error)
            made.append((RowMap.of(owner, row), companions, notes, config_error))
            continue
        companions = {FILE: joined}
        try:
            companions = renumbered_companions(source.companions, tokenizer, ids, joined, total)
        except UserError as error:  # matters only where the output is to have this config
            config_error = str(error)
        stale = [name for name in source.companions if name in STALE]
        notes = [f"{', '.join(stale)} of {source.address} left out: tokenizer.json says it"] if stale else []
        made.append((RowMap.of(owner, row), companions, notes, config_error))
    return made


def _needed(tokenizer: Tokenizer | None, source: WeightSource, rule: str) -> Tokenizer:
    if tokenizer is None:
        raise UserError(
            f"{source.address}: vocabulary: {rule} goes by token and needs a {FILE} beside the weights (transformers "
            "writes it: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR))"
        )
    return tokenizer
