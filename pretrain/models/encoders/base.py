"""The interface of a vision encoder: images in, visual tokens out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Preprocessing:
    """The images with which an encoder was trained.

    size: height and width, in pixels
    mean, std: of R, G and B, on the scale 0 to 1
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Encoder(ABC):
    """Turns images into visual tokens with a module that belongs to the language model's own module tree.

    module: its parameters; `VisionLanguageModel` registers it as `vision.N`, so that the engine moves, casts and
    shards it
    preprocessing: what it expects of images; None if it takes any, as a new one may
    """

    module: nn.Module
    preprocessing: Preprocessing | None = None

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
        """Normalised images, fp32 `[rows, 3, size, size]` -> `[rows, token_count, width]` in the module's own dtype.

        The engine may have cast the module to bf16 and, under ZeRO-3, sharded it: cast the images, and call submodules
        rather than read their weights.
        """
