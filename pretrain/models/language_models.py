"""Language models inside a model that sees: their interface, transformers' causal ones, and what a recipe can name.

`LANGUAGE_MODELS` has one entry per place where a model comes from: a key of `model.llm` of a recipe.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from data_pipeline.transforms.tokenizers import Tokenizer
from pretrain.recipe.sections.model import Llm


class LanguageModel(ABC):
    """Embeds tokens, runs on embeddings, and gives logits, with a module that belongs to the whole model's tree.

    module: its parameters; `VisionLanguageModel` registers it as `llm`, so that the engine moves, casts and shards it
    """

    module: nn.Module

    @property
    @abstractmethod
    def width(self) -> int:
        """Width of an embedding."""

    @property
    @abstractmethod
    def initial_deviation(self) -> float:
        """Standard deviation of its initial weights; for new embeddings beside its own."""

    @property
    @abstractmethod
    def max_length(self) -> int | None:
        """Largest number of tokens of a row; None for no limit."""

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids, int64 `[rows, length]` -> embeddings `[rows, length, width]`."""

    @abstractmethod
    def hidden(self, embedded: Tensor) -> Tensor:
        """Embeddings `[rows, length, width]` -> last hidden states of the same shape; a token sees those before it."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `[..., width]` -> logits `[..., vocabulary]`."""

    @abstractmethod
    def save_pretrained(self, folder: Path) -> None:
        """Write config and weights as a folder that transformers loads."""


class CausalLanguageModel(LanguageModel):
    """A causal language model of transformers."""

    def __init__(self, llm: nn.Module) -> None:
        self.module = llm
        self._llm: Any = llm  # its methods are those of transformers, not of torch.nn.Module

    @property
    def width(self) -> int:
        return int(self._llm.config.hidden_size)

    @property
    def initial_deviation(self) -> float:
        return float(getattr(self._llm.config, "initializer_range", 0.02))

    @property
    def max_length(self) -> int | None:
        limit: int | None = getattr(self._llm.config, "max_position_embeddings", None)
        return limit

    def embed(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self._llm.get_input_embeddings()(tokens)
        return embedded

    def hidden(self, embedded: Tensor) -> Tensor:
        hidden: Tensor = self._llm.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._llm.get_output_embeddings()(hidden)
        return logits

    def save_pretrained(self, folder: Path) -> None:
        self._llm.save_pretrained(folder)


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
