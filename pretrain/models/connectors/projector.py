"""A linear layer as connector."""

from __future__ import annotations

from torch import Tensor, nn


class Projector(nn.Module):
    """A linear layer from the width of the visual tokens to that of the language model, and optionally a LayerNorm.

    SPHINX has the norm (llama_ens.py of LLaMA2-Accessory), PaliGemma has none.
    """

    def __init__(self, width: int, hidden: int, norm: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden) if norm else None

    def forward(self, tokens: Tensor) -> Tensor:
        """`[rows, n, width]` -> `[rows, n, hidden]`."""
        projected: Tensor = self.linear(tokens)
        return projected if self.norm is None else self.norm(projected)
