"""`DeviceBatch`: the rows of one stream as tensors on the device, with normalised images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batches.spec import Batch
from pretrain.recipe.data import Image


@dataclass(frozen=True)
class DeviceBatch:
    """Rows of one stream on one rank."""

    images: Tensor | None
    """float32 `[rows, 3, size, size]`, normalised; None for text."""
    tokens: Tensor
    """int64 `[rows, length]`."""
    used: Tensor
    """int64 `[rows]`, number of tokens before padding."""
    weights: Tensor
    """float32 `[rows]`; 0 for dummy rows and for unusable samples of an evaluation."""
    sample_ids: Tensor
    """int64 `[rows]`, equal for rows of the same sample."""
    keys: Tensor
    """int64 `[rows]`, key of all random choices of the row."""
    longest: int
    """Number of tokens of the longest row, at least 2; later columns are all padding."""

    def __len__(self) -> int:
        return len(self.tokens)


def host_tensors(batch: Batch) -> dict[str, Tensor]:
    """A batch's arrays as tensors for `device_rows`; pixels stay uint8 and share the batch's memory."""
    tensors = {
        "tokens": torch.from_numpy(batch.tokens.astype(np.int64)),
        "used": torch.from_numpy(batch.used.astype(np.int64)),
        "weights": torch.from_numpy(batch.weights.astype(np.float32)),
        "sample_ids": torch.from_numpy(batch.sample_ids.view(np.int64)),
        "keys": torch.from_numpy(batch.row_keys.view(np.int64)),
    }
    if batch.pixels is not None:
        tensors["pixels"] = torch.from_numpy(batch.pixels)
    return tensors


def device_rows(moved: Mapping[str, Tensor], batch: Batch, image: Image | None) -> DeviceBatch:
    """Build a DeviceBatch from tensors that are on the device. uint8 pixels are normalised there."""
    images = None
    if "pixels" in moved and image is not None:
        device = moved["pixels"].device
        mean = torch.tensor(image.mean, device=device).view(1, 3, 1, 1) * 255
        scale = 1 / (torch.tensor(image.std, device=device).view(1, 3, 1, 1) * 255)
        pixels = moved["pixels"].permute(0, 3, 1, 2)
        images = (pixels.to(torch.float32, memory_format=torch.contiguous_format) - mean) * scale
    return DeviceBatch(
        images=images,
        longest=max(2, int(batch.used.max(initial=0))),
        **{name: tensor for name, tensor in moved.items() if name != "pixels"},
    )


def to_device(batch: Batch, image: Image | None, device: torch.device) -> DeviceBatch:
    """Copy a batch to `device` synchronously and normalise its pixels."""
    moved = {name: tensor.to(device) for name, tensor in host_tensors(batch).items()}
    return device_rows(moved, batch, image)
