"""Frozen vision towers that turn images into tokens for a language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FrozenTower(nn.Module):
    """An open_clip vision transformer without gradients, always in eval mode.

    Its tokens are the class token and all patch tokens, after the final norm and before the projection, as SPHINX uses
    CLIP's ViT (llama_ens.py of LLaMA2-Accessory).
    """

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenTower:
        """Does nothing: a frozen tower stays in eval mode when its parent is set to train mode."""
        return super().train(False)

    @property
    def width(self) -> int:
        """Width of a token."""
        return int(self.visual.ln_post.normalized_shape[0])

    @property
    def token_count(self) -> int:
        """Tokens per image: the class token and the patches."""
        grid = self.visual.grid_size
        return 1 + int(grid[0] * grid[1])

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Normalised images `[rows, 3, size, size]` -> `[rows, 1 + patches, width]`."""
        visual = self.visual
        return visual.ln_post(visual.transformer(visual._embeds(images)))
