"""Tied weights: stored once, used under two names, as transformers' configs and model classes define them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

# Stored name -> names of the same weight, as in the `_tied_weights_keys` of transformers' model classes.
TIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"^(.*?)(?:model\.)?(?:language_model\.|decoder\.)?embed_tokens\.weight$", (r"\1lm_head.weight",)),
    (r"^(.*?)(?:transformer\.)?(?:wte|word_embeddings)\.weight$", (r"\1lm_head.weight",)),
    # The first name up to transformers 4, the second since version 5.
    (r"^(.*?)gpt_neox\.embed_in\.weight$", (r"\1embed_out.weight", r"\1lm_head.weight")),
    (r"^(.*?)backbone\.embeddings\.weight$", (r"\1lm_head.weight",)),
    (
        r"^(.*?)shared\.weight$",
        (r"\1encoder.embed_tokens.weight", r"\1decoder.embed_tokens.weight", "lm_head.weight"),
    ),
    (r"^(.*?)bert\.embeddings\.word_embeddings\.weight$", (r"\1cls.predictions.decoder.weight",)),
    (r"^(.*?)roberta\.embeddings\.word_embeddings\.weight$", (r"\1lm_head.decoder.weight",)),
    (r"^(.*?)cls\.predictions\.bias$", (r"\1cls.predictions.decoder.bias",)),
    (r"^(.*?)lm_head\.bias$", (r"\1lm_head.decoder.bias",)),
)
HEADED = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|ForMaskedLM)$")


def tie_setting(config: Any) -> bool | None:
    """`tie_word_embeddings` of a config.json, at the top level or in `text_config`; None if it is not set."""
    if not isinstance(config, dict):
        return None
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


def tied_names(
    names: Collection[str], config: Any, equal: Callable[[str, str], bool] | None = None
) -> dict[str, str]:
    """Map each tied name to the stored name of the same weight.

    If the config sets `tie_word_embeddings`, or does not mention it and its model class has a head, the names of TIES
    that are not stored count as tied. A name that is also stored counts as tied only if the config sets
    it and `equal(name, stored)`.
    """
    tied = tie_setting(config)
    classes = config.get("architectures") if isinstance(config, dict) else None
    headed = isinstance(classes, list) and any(isinstance(cls, str) and HEADED.search(cls) for cls in classes)
    if tied is False or (tied is None and not headed):
        return {}
    stored = set(names)
    found: dict[str, str] = {}
    for name in names:
        for pattern, others in TIES:
            match = re.match(pattern, name)
            for other in [match.expand(other) for other in others] if match else ():
                if other == name or other in found or name in found:
                    continue
                if other not in stored or (tied and equal is not None and equal(other, name)):
                    found[other] = name
    return found
