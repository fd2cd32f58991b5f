"""Next-token losses as sums per row; the caller divides by the denominator summed over all ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def next_token_nll(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Sum of `-log p(target)` over the valid positions of each row, fp32 `[rows]`.

    `logits`: `[rows, positions, vocabulary]`, already aligned with `targets` `[rows, positions]` (position i
    predicts target i); `valid`: bool `[rows, positions]`. Computed in fp32 for logits of any dtype.
    """
    rows, positions, vocabulary = logits.shape
    losses = F.cross_entropy(logits.reshape(-1, vocabulary).float(), targets.reshape(-1), reduction="none")
    return torch.where(valid, losses.view(rows, positions), 0.0).sum(dim=1)


def valid_targets(used: Tensor, length: int) -> Tensor:
    """Mask of the targets that are not padding, bool `[rows, length - 1]`; target i is token i + 1 of the row.

    `used`: int64 `[rows]`, tokens before padding.
    """
    return torch.arange(1, length, device=used.device)[None, :] < used[:, None]
