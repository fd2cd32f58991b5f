"""One pass over a held-out source in manifest order; each rank takes its slice of every batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.batches import Batch, StreamSpec
from data_pipeline.evaluation import EvaluationMaker
from pretrain.engine import Runtime
from pretrain.recipe import Image
from pretrain.rows import Rows, to_device


def passes(
    maker: EvaluationMaker, spec: StreamSpec, image: Image | None, runtime: Runtime
) -> Iterator[tuple[Rows, Batch]]:
    """Slices of this rank, the same number on every rank, so that ZeRO-3 stays in lock-step."""
    for number in range(len(maker)):
        start = runtime.rank * spec.batch // runtime.world_size
        stop = (runtime.rank + 1) * spec.batch // runtime.world_size
        batch = maker.make(number, start, stop)
        yield to_device(batch, image, runtime.device), batch


def summed(values: Tensor) -> Tensor:
    """Sum over ranks; the tensor itself where there is one rank."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def shuffled_images(rows: Rows) -> Rows:
    """The same captions, each with the image of another row: rolled by one among the rows that count."""
    assert rows.images is not None
    real = int((rows.weights > 0).sum())
    order = torch.arange(len(rows), device=rows.tokens.device)
    order[:real] = torch.roll(order[:real], 1)
    return replace(rows, images=rows.images[order])
