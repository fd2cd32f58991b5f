"""`DeviceBatch`: the rows of one stream as tensors on the device, with normalised images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batches.spec import Batch
from pretrain.recipe.sections.data import Image

# Tensors of every batch beside those of its fields.
OF_EVERY_BATCH = ("weights", "sample_ids", "keys")


@dataclass(frozen=True)
class DeviceBatch:
    """Rows of one stream on one rank."""

    fields: Mapping[str, Tensor]
    """The named arrays of the batch, `[rows, ...]`; integers are int64. In a stream with images `images`, float32
    `[rows, images, 3, size, size]`, normalised, in place of `pixels`."""
    weights: Tensor
    """float32 `[rows]`; 0 for dummy rows and for unusable samples of an evaluation."""
    sample_ids: Tensor
    """int64 `[rows]`, equal for rows of the same sample."""
    keys: Tensor
    """int64 `[rows]`, key of all random choices of the row."""
    longest: int
    """Number of tokens of the longest row, at least 2; later columns of `tokens` are all padding."""

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def images(self) -> Tensor | None:
        """The only image of each row, float32 `[rows, 3, size, size]`, normalised; None for text.

        Raises ValueError if rows have several images; `fields["images"]` has them all.
        """
        images = self.fields.get("images")
        if images is None:
            return None
        if images.shape[1] != 1:
            raise ValueError(f"a row has {images.shape[1]} images; read fields['images']")
        return images[:, 0]

    @property
    def tokens(self) -> Tensor:
        """int64 `[rows, length]`."""
        return self.fields["tokens"]

    @property
    def used(self) -> Tensor:
        """int64 `[rows]`, number of tokens before padding."""
        return self.fields["used"]


def host_tensors(batch: Batch) -> dict[str, Tensor]:
    """A batch's arrays as tensors for `device_rows`; pixels stay uint8 and share the batch's memory."""
    tensors = {name: _host_tensor(name, array) for name, array in batch.fields.items()}
    return tensors | {
        "weights": torch.from_numpy(batch.weights.astype(np.float32)),
        "sample_ids": torch.from_numpy(batch.sample_ids.view(np.int64)),
        "keys": torch.from_numpy(batch.row_keys.view(np.int64)),
    }


def _host_tensor(name: str, array: np.ndarray) -> Tensor:
    """Integers as int64, the type of torch's indices; all else, and pixels, in the dtype of the array."""
    widened = name != "pixels" and np.issubdtype(array.dtype, np.integer)
    return torch.from_numpy(array.astype(np.int64) if widened else array)


def device_rows(moved: Mapping[str, Tensor], batch: Batch, image: Image | None) -> DeviceBatch:
    """Build a DeviceBatch from tensors that are on the device. uint8 pixels are normalised there."""
    own = {name: moved[name] for name in OF_EVERY_BATCH}
    fields = {name: tensor for name, tensor in moved.items() if name not in (*OF_EVERY_BATCH, "pixels")}
    if "pixels" in moved and image is not None:
        fields["images"] = _normalised(moved["pixels"], image)
    return DeviceBatch(fields, longest=max(2, _longest(batch)), **own)


def _longest(batch: Batch) -> int:
    """Tokens of the longest row; where nothing says how many are padding, all."""
    return int(batch.used.max(initial=0)) if "used" in batch.fields else batch.tokens.shape[1]


def _normalised(pixels: Tensor, image: Image) -> Tensor:
    """uint8 `[rows, images, size, size, 3]` -> float32 `[rows, images, 3, size, size]`, minus mean, by deviation."""
    mean = torch.tensor(image.mean, device=pixels.device).view(1, 3, 1, 1) * 255
    scale = 1 / (torch.tensor(image.std, device=pixels.device).view(1, 3, 1, 1) * 255)
    flat = pixels.flatten(0, 1).permute(0, 3, 1, 2)
    images = (flat.to(torch.float32, memory_format=torch.contiguous_format) - mean) * scale
    return images.unflatten(0, pixels.shape[:2])


def to_device(batch: Batch, image: Image | None, device: torch.device) -> DeviceBatch:
    """Copy a batch to `device` synchronously and normalise its pixels."""
    moved = {name: tensor.to(device) for name, tensor in host_tensors(batch).items()}
    return device_rows(moved, batch, image)
