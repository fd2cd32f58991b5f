"""The interface of a language model inside a model that sees, and transformers' causal language models behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from torch import Tensor, nn


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
