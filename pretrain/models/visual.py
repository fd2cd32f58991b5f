"""Frozen vision towers as token extractors for a language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FrozenTower(nn.Module):
    """Patch tokens of an open_clip vision transformer: eval mode for good, no gradient.

    Tokens are the class token and all patches after the final norm, before the projection, as SPHINX takes
    them from CLIP ViT (llama_ens.py of LLaMA2-Accessory).
    """

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenTower:
        """Stays in eval mode: a frozen tower has nothing to train."""
        return super().train(False)

    @property
    def width(self) -> int:
        return int(self.visual.ln_post.normalized_shape[0])

    @property
    def tokens(self) -> int:
        grid = self.visual.grid_size
        return 1 + int(grid[0] * grid[1])

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Normalised images `[rows, 3, size, size]` -> `[rows, 1 + patches, width]`."""
        visual = self.visual
        return visual.ln_post(visual.transformer(visual._embeds(images)))
