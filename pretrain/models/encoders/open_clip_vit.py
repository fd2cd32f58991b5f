"""open_clip's vision transformer as the encoder of a language model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pretrain.models.encoders.base import Encoder, Preprocessing


class OpenClipVit(Encoder):
    """The class token and all patch tokens, after the final norm and before the projection.

    SPHINX uses CLIP's ViT so (llama_ens.py of LLaMA2-Accessory).
    """

    def __init__(self, visual: nn.Module, preprocessing: Preprocessing | None = None) -> None:
        self.module = visual
        self.preprocessing = preprocessing
        self._visual: Any = visual  # its attributes are open_clip's

    @property
    def width(self) -> int:
        return int(self._visual.ln_post.normalized_shape[0])

    @property
    def token_count(self) -> int:
        grid = self._visual.grid_size
        return 1 + int(grid[0] * grid[1])

    def tokens(self, images: Tensor) -> Tensor:
        visual = self._visual
        embedded = visual._embeds(images.to(visual.conv1.weight.dtype))
        tokens: Tensor = visual.ln_post(visual.transformer(embedded))
        return tokens
