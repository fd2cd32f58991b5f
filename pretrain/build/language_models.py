"""Builds the language model of a stage from `model.llm` of a recipe.

`LANGUAGE_MODELS` has one entry per place where it comes from; the interface is pretrain/models/language_model.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from data_pipeline.errors import UserError
from data_pipeline.transforms.tokenizers import Tokenizer
from pretrain.models.language_model import CausalLanguageModel, LanguageModel
from pretrain.recipe.sections.model import Llm


def build_language_model(llm: Llm | None, tokenizer: Tokenizer) -> LanguageModel:
    """The language model of a stage, with weights from torch's global generator if it is new. Raises UserError."""
    written = [key for key in LANGUAGE_MODELS if llm is not None and getattr(llm, key) is not None]
    if llm is None or len(written) != 1:
        raise UserError(
            f"model.llm: the language model needs exactly one of {', '.join(LANGUAGE_MODELS)}; "
            f"here: {', '.join(written) or 'none'}"
        )
    return LANGUAGE_MODELS[written[0]](llm, tokenizer)


def new_model(llm: Llm, tokenizer: Tokenizer) -> LanguageModel:
    """A new model from `llm.config`, with the vocabulary of the tokenizer. Raises UserError for dropout."""
    special_tokens = {
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": tokenizer.end_id,
        "pad_token_id": tokenizer.pad_id,
    }
    return causal_model(llm.config or {}, tokenizer.vocab_size, special_tokens)


def causal_model(config: dict[str, Any], vocabulary: int, specials: dict[str, int]) -> CausalLanguageModel:
    """A new fp32 causal language model of transformers, initialised from torch's global random generator.

    vocabulary: number of tokens; specials: token ids such as pad_token_id. `config` overrides both. Raises UserError
    for dropout.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"vocab_size": vocabulary, **specials, **config}
    kind = settings.pop("model_type")
    resolved = AutoConfig.for_model(kind, **settings)
    refuse_dropout(resolved.to_dict())
    return CausalLanguageModel(AutoModelForCausalLM.from_config(resolved, dtype=torch.float32))


def refuse_dropout(config: dict[str, Any], where: str = "model.llm.config") -> None:
    """Raise UserError for dropout, which draws from a rank's generator: results would depend on the world size.

    `config` is the resolved one, because some model types have dropout by default.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            refuse_dropout(value, f"{where}.{key}")
        elif "drop" in str(key) and isinstance(value, int | float) and value > 0:
            raise UserError(f"{where}.{key}: {value}: dropout is not supported, set it to 0")


# Key of `model.llm` that says where the model comes from -> function that builds it.
LANGUAGE_MODELS: dict[str, Callable[[Llm, Tokenizer], LanguageModel]] = {"config": new_model}
