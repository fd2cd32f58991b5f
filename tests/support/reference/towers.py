"""The two transformers of a contrastive model as plain functions of open_clip's parameters by name.

Vision: patches by a matrix product, class token, position embeddings, then only the kept patches, pre-norm blocks
(Dosovitskiy et al. 2021; FLIP, section 3.1: "masking is applied after adding positional embeddings").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
END = 2  # id of the end token


def norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return centred * scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attention(x: Tensor, weights: Weights, name: str, heads: int, causal: bool) -> Tensor:
    rows, length, width = x.shape
    projected = x @ weights[f"{name}.in_proj_weight"].T + weights[f"{name}.in_proj_bias"]
    q, k, v = (part.reshape(rows, length, heads, -1).transpose(1, 2) for part in projected.split(width, -1))
    scores = q @ k.transpose(2, 3) / (width // heads) ** 0.5
    if causal:
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(rows, length, width)
    return linear(mixed, weights, f"{name}.out_proj")


def blocks(x: Tensor, weights: Weights, prefix: str, heads: int, causal: bool) -> Tensor:
    """All blocks `PREFIXresblocks.N` in order."""
    number = 0
    while f"{prefix}resblocks.{number}.ln_1.weight" in weights:
        block = f"{prefix}resblocks.{number}"
        x = x + attention(norm(x, weights, f"{block}.ln_1"), weights, f"{block}.attn", heads, causal)
        hidden = F.gelu(linear(norm(x, weights, f"{block}.ln_2"), weights, f"{block}.mlp.c_fc"))
        x = x + linear(hidden, weights, f"{block}.mlp.c_proj")
        number += 1
    return x


def vision_tokens(
    images: Tensor, weights: Weights, tower: Mapping[str, Any], keep: list[list[int]] | None = None
) -> Tensor:
    """Class token and (kept) patches after the final norm, `[rows, 1 + patches, width]`."""
    kernel = weights["conv1.weight"]
    width, _, patch, _ = kernel.shape
    rows, _, size, _ = images.shape
    grid = size // patch
    squares = images.reshape(rows, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
    patches = squares.reshape(rows, grid * grid, -1) @ kernel.reshape(width, -1).T
    first = weights["class_embedding"].expand(rows, 1, width)
    x = torch.cat([first, patches], dim=1) + weights["positional_embedding"]
    if keep is not None:
        x = torch.stack([row[[0, *(1 + patch for patch in kept)]] for row, kept in zip(x, keep, strict=True)])
    x = norm(x, weights, "ln_pre")
    x = blocks(x, weights, "transformer.", width // tower.get("head_width", 64), causal=False)
    return norm(x, weights, "ln_post")


def image_features(
    images: Tensor, weights: Weights, tower: Mapping[str, Any], keep: list[list[int]] | None
) -> Tensor:
    """L2-normalised `[rows, embed]`."""
    visual = {
        name.removeprefix("visual."): tensor for name, tensor in weights.items() if name.startswith("visual.")
    }
    tokens = vision_tokens(images, visual, tower, keep)
    pooled = tokens[:, 1:].mean(1) if tower.get("pool") == "avg" else tokens[:, 0]
    return unit(pooled @ visual["proj"])


def text_features(tokens: list[list[int]], weights: Weights, tower: Mapping[str, Any]) -> Tensor:
    """L2-normalised features `[rows, embed]` at the first end token of each row."""
    x = weights["token_embedding.weight"][torch.tensor(tokens)] + weights["positional_embedding"]
    x = blocks(x, weights, "transformer.", tower["heads"], tower.get("causal", True))
    ends = torch.stack([row[ids.index(END)] for row, ids in zip(x, tokens, strict=True)])
    return unit(norm(ends, weights, "ln_final") @ weights["text_projection"])


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def normalised(pixels: list[Any], settings: Mapping[str, Any]) -> Tensor:
    """uint8 images to float64 `[rows, 3, size, size]`, with CLIP's mean and deviation by default."""
    mean = torch.tensor(settings.get("mean", (0.48145466, 0.4578275, 0.40821073)), dtype=torch.float64)
    std = torch.tensor(settings.get("std", (0.26862954, 0.26130258, 0.27577711)), dtype=torch.float64)
    scaled = torch.stack([torch.tensor(image.tolist(), dtype=torch.float64) for image in pixels]) / 255
    return ((scaled - mean) / std).permute(0, 3, 1, 2)
