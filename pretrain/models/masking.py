"""Patch masks by integer hash of (row key, patch): the same bits on every rank and device."""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipeline.hashing import Purpose


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit constant; torch has no uint64 arithmetic."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of an int64 tensor (torch's >> is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def hash64(*parts: Tensor | int) -> Tensor:
    """`data_pipeline.hashing.hash64` on int64 tensors of any device; the int64 has the bits of the uint64."""
    state = torch.tensor(_signed(0x9E3779B97F4A7C15))
    for part in parts:
        state = _mix64(state * _signed(0xD1342543DE82EF95) + part)
    return state


def patches_kept(patches: int, ratio: float) -> int:
    """Number of patches that remain: int(patches * (1 - ratio)), at least 1, as in FLIP's random_mask."""
    return max(1, int(patches * (1 - ratio)))


def keep_patches(row_keys: Tensor, patches: int, ratio: float) -> Tensor | None:
    """Indices of the patches that each row keeps, int64 `[rows, kept]`, ascending; None for ratio 0.

    `row_keys`: int64 `[rows]`. `ratio`: fraction of masked patches. Each patch gets a hash as noise, and the patches
    with the smallest noise are kept (FLIP, section 3.1).
    """
    if ratio == 0:
        return None
    index = torch.arange(patches, device=row_keys.device)
    noise = hash64(row_keys[:, None], int(Purpose.IMAGE_MASK), index[None, :])
    order = torch.argsort(noise, dim=1, stable=True)
    return order[:, : patches_kept(patches, ratio)].sort(dim=1).values
