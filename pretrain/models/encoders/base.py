"""The interface of a vision encoder: images in, visual tokens out."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Encoder(ABC):
    """Turns images into visual tokens with a module that belongs to the language model's own module tree.

    module: its parameters; `VisionLanguageModel` registers it as `vision.N`, so that the engine moves, casts and
    shards it
    """

    module: nn.Module

    @property
    @abstractmethod
    def width(self) -> int:
        """Width of a token."""

    @property
    @abstractmethod
    def token_count(self) -> int:
        """Tokens per image."""

    @abstractmethod
    def tokens(self, images: Tensor) -> Tensor:
        """Normalised images `[rows, 3, size, size]` -> `[rows, token_count, width]`."""
