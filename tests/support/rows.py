"""Rows of a stream without files: as the loader's Batch, and on the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batches.spec import Batch
from pretrain.objectives.device_batch import DeviceBatch


def batch(tokens: np.ndarray, used: list[int] | None = None, start: int = 0, **arrays: Any) -> Batch:
    """A Batch of these tokens `[rows, length]`; by default without padding, of weight 1, with ids 0, 1, 2, ..."""
    rows, length = tokens.shape
    fields = {
        "tokens": tokens.astype(np.int32),
        "used": np.array([length] * rows if used is None else used, np.int32),
    }
    pixels = arrays.pop("pixels", None)  # [rows, size, size, 3]
    if pixels is not None:
        fields["pixels"] = pixels[:, None]
    default: dict[str, Any] = {
        "weights": np.ones(rows, np.float32),
        "sample_ids": np.arange(rows, dtype=np.uint64),
        "row_keys": np.arange(rows, dtype=np.uint64),
    }
    return Batch(
        stream="s",
        step=0,
        start=start,
        stop=start + rows,
        fields=fields,
        **default | arrays,
    )


def device_batch(
    tokens: Tensor, used: list[int], images: Tensor | None = None, **arrays: Tensor
) -> DeviceBatch:
    """The same on the device, with normalised images."""
    rows = len(tokens)
    default = {
        "weights": torch.ones(rows),
        "sample_ids": torch.arange(rows),
        "keys": torch.arange(rows) * 7919 + 3,
    }
    fields = {"tokens": tokens, "used": torch.tensor(used)}
    if images is not None:
        fields["images"] = images[:, None]
    return DeviceBatch(fields, longest=max(2, *used), **default | arrays)


def with_images(rows: DeviceBatch, images: Tensor) -> DeviceBatch:
    """The same rows with one image each, `[rows, 3, size, size]`."""
    return replace(rows, fields={**rows.fields, "images": images[:, None]})


def part_of(rows: DeviceBatch, start: int, stop: int) -> DeviceBatch:
    """Rows [start, stop) as a micro-batch of their own."""
    fields = {name: value[start:stop] for name, value in rows.fields.items()}
    cut = {name: value[start:stop] for name, value in vars(rows).items() if isinstance(value, Tensor)}
    return DeviceBatch(fields, longest=max(2, int(fields["used"].max())), **cut)
