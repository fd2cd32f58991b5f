"""CLIP's two towers written out by hand in fp64, from the tensors of a state dict: the reference for our models."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def part(state: State, prefix: str) -> dict[str, Tensor]:
    """The tensors below `prefix`, in fp64, without the prefix."""
    return {n.removeprefix(prefix): t.detach().double() for n, t in state.items() if n.startswith(prefix)}


def layer_norm(x: Tensor, state: State, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    spread = (centred**2).mean(-1, keepdim=True)
    return centred / (spread + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention(x: Tensor, state: State, heads: int, causal: bool) -> Tensor:
    """Multi-head attention of `[rows, tokens, width]`, head by head."""
    width, tokens = x.shape[2], x.shape[1]
    size = width // heads
    query, key, value = (x @ state["attn.in_proj_weight"].T + state["attn.in_proj_bias"]).split(width, dim=2)
    outputs = []
    for head in range(heads):
        of_head = slice(head * size, (head + 1) * size)
        scores = query[..., of_head] @ key[..., of_head].transpose(1, 2) / math.sqrt(size)
        if causal:
            later = torch.arange(tokens)[None, :] > torch.arange(tokens)[:, None]
            scores = scores.masked_fill(later, -math.inf)
        outputs.append(scores.softmax(-1) @ value[..., of_head])
    return torch.cat(outputs, dim=2) @ state["attn.out_proj.weight"].T + state["attn.out_proj.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def blocks(x: Tensor, state: State, heads: int, causal: bool) -> Tensor:
    """All residual blocks: attention and MLP, each after a LayerNorm."""
    layers = {int(name.split(".")[0]) for name in part(state, "resblocks.")}
    for layer in range(len(layers)):
        of_layer = part(state, f"resblocks.{layer}.")
        x = x + attention(layer_norm(x, of_layer, "ln_1"), of_layer, heads, causal)
        hidden = gelu(
            layer_norm(x, of_layer, "ln_2") @ of_layer["mlp.c_fc.weight"].T + of_layer["mlp.c_fc.bias"]
        )
        x = x + hidden @ of_layer["mlp.c_proj.weight"].T + of_layer["mlp.c_proj.bias"]
    return x


def vision_tokens(state: State, images: Tensor, heads: int, keep: list[list[int]] | None = None) -> Tensor:
    """Tokens `[rows, 1 + kept, width]` after the last LayerNorm: the class token, then the kept patches.

    Each patch is cut out of the image, embedded and given the position embedding of its place; only then are the
    patches in `keep` chosen, row by row. A tower that receives nothing but these patches computes the same.
    """
    visual = part(state, "visual.")
    kernel = visual["conv1.weight"]
    side, across = kernel.shape[2], images.shape[3] // kernel.shape[2]
    rows = []
    for row, image in enumerate(images.double()):
        places = keep[row] if keep is not None else range(across * (images.shape[2] // side))
        tokens = [visual["class_embedding"] + visual["positional_embedding"][0]]
        for place in places:
            y, x = place // across * side, place % across * side
            patch = image[:, y : y + side, x : x + side]
            tokens.append(kernel.flatten(1) @ patch.flatten() + visual["positional_embedding"][1 + place])
        rows.append(torch.stack(tokens))
    x = layer_norm(torch.stack(rows), visual, "ln_pre")
    return layer_norm(blocks(x, part(visual, "transformer."), heads, causal=False), visual, "ln_post")


def unit(x: Tensor) -> Tensor:
    """Rows of length 1."""
    return x / (x**2).sum(-1, keepdim=True).sqrt()


def image_features(
    state: State, images: Tensor, heads: int, pool: str, keep: list[list[int]] | None = None
) -> Tensor:
    """L2-normalised image features; `pool`: tok is the class token, avg the mean of the patch tokens."""
    tokens = vision_tokens(state, images, heads, keep)
    pooled = tokens[:, 0] if pool == "tok" else tokens[:, 1:].mean(1)
    return unit(pooled @ part(state, "visual.")["proj"])


def text_features(state: State, tokens: Tensor, heads: int, end: int, causal: bool) -> Tensor:
    """L2-normalised text features: those of the first end token."""
    whole = part(state, "")
    x = whole["token_embedding.weight"][tokens] + whole["positional_embedding"]
    x = layer_norm(blocks(x, part(whole, "transformer."), heads, causal), whole, "ln_final")
    at_end = torch.stack([row[ids.tolist().index(end)] for row, ids in zip(x, tokens, strict=True)])
    return unit(at_end @ whole["text_projection"])


def sincos(width: int, across: int) -> Tensor:
    """Position embeddings `[1 + across * across, width]` of MAE (He et al. 2022): none for the class token; then sine
    and cosine of the column, sine and cosine of the row, each at width / 4 frequencies from 1 to 1/10000."""
    rates = [10000 ** (-k / (width // 4)) for k in range(width // 4)]
    table = [[0.0] * width]
    for row in range(across):
        for column in range(across):
            table.append(
                [wave(at * rate) for at in (column, row) for wave in (math.sin, math.cos) for rate in rates]
            )
    return torch.tensor(table, dtype=torch.float64)
