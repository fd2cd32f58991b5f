"""Weights that a model keeps once and uses under two names, as transformers' configs and model classes say it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

# Stored name -> names of the same weight, as in the `_tied_weights_keys` of transformers' model classes.
TIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"^(.*?)(?:model\.)?(?:language_model\.|decoder\.)?embed_tokens\.weight$", (r"\1lm_head.weight",)),
    (r"^(.*?)(?:transformer\.)?(?:wte|word_embeddings)\.weight$", (r"\1lm_head.weight",)),
    # The first before transformers 5, the second since.
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
    """`tie_word_embeddings` of a config.json, at its top or in `text_config`; None where it says nothing."""
    if not isinstance(config, dict):
        return None
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


def tied_names(
    names: Collection[str], config: Any, equal: Callable[[str, str], bool] | None = None
) -> dict[str, str]:
    """Name of a weight that is another one -> the name that this one is stored under.

    Where the config ties, or says nothing of it and the model has a head that is not stored, the absent names of TIES
    are ties. A name that is stored too, although the config ties it, is one when `equal(name, stored)`.
    """
    tied = tie_setting(config)
    classes = config.get("architectures") if isinstance(config, dict) else None
    headed = isinstance(classes, list) and any(isinstance(one, str) and HEADED.search(one) for one in classes)
    if tied is False or (tied is None and not headed):
        return {}
    held = set(names)
    found: dict[str, str] = {}
    for name in names:
        for pattern, others in TIES:
            match = re.match(pattern, name)
            for other in [match.expand(other) for other in others] if match else ():
                if other == name or other in found or name in found:
                    continue
                if other not in held or (tied and equal is not None and equal(other, name)):
                    found[other] = name
    return found
