"""One pass over a held-out source in manifest order; each rank takes its slice of every batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from data_pipeline.batches.evaluation_pass import EvaluationPass
from data_pipeline.batches.spec import Batch, StreamSpec
from data_pipeline.errors import UserError
from pretrain.distributed.engine import Runtime
from pretrain.objectives.device_batch import DeviceBatch, to_device
from pretrain.recipe.data import Image


def passes(
    builder: EvaluationPass, spec: StreamSpec, image: Image | None, runtime: Runtime
) -> Iterator[tuple[DeviceBatch, Batch]]:
    """Slices of this rank, the same number on every rank, so that ZeRO-3 stays in lock-step."""
    for number in range(len(builder)):
        start = runtime.rank * spec.largest // runtime.world_size
        stop = (runtime.rank + 1) * spec.largest // runtime.world_size
        batch = builder.make(number, start, stop)
        yield to_device(batch, image, runtime.device), batch


def unusable(batch: Batch) -> int:
    """Samples of a held-out batch that were left out because of their content."""
    return sum(sum(reasons.values()) for reasons in batch.skipped.values())


def tell_left_out(path: str, counted: float, left_out: float, runtime: Runtime) -> None:
    """Nothing is left out in silence, and a figure of no sample at all is none: UserError."""
    if not counted:
        raise UserError(
            f"eval: {path}: not one usable sample ({left_out:.0f} unusable); look at it: dromos data show {path}"
        )
    if left_out and runtime.rank == 0:
        print(f"dromos: evaluation of {path}: {left_out:.0f} unusable samples were left out", flush=True)


def shuffled_images(rows: DeviceBatch) -> DeviceBatch:
    """The same captions, each with the image of another row: rolled by one among the rows that count."""
    assert rows.images is not None
    order = torch.arange(len(rows), device=rows.tokens.device)
    counted = torch.nonzero(rows.weights > 0)[:, 0]
    order[counted] = torch.roll(counted, 1)
    return replace(rows, images=rows.images[order])
