"""One pass over a held-out source in manifest order, split over ranks; left-out samples are counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from data_pipeline.batches.evaluation_pass import EvaluationPass
from data_pipeline.batches.spec import Batch, StreamSpec
from data_pipeline.batches.work_items import largest_share, rows_of
from data_pipeline.errors import UserError
from pretrain.distributed.engine import Runtime
from pretrain.objectives.device_batch import DeviceBatch, to_device
from pretrain.recipe.data import Image


def rank_slices(
    evaluation_pass: EvaluationPass, spec: StreamSpec, image: Image | None, runtime: Runtime
) -> Iterator[tuple[DeviceBatch, Batch]]:
    """This rank's slice of every batch, on the device and as the loader's Batch.

    Every rank gets the same number of slices, because the forwards of ZeRO-3 are collective, and dummy rows if another
    rank has more rows: a model need not compute a batch without rows.
    """
    start, stop = rows_of(runtime.rank, runtime.world_size, spec.largest)
    dummies = largest_share(runtime.world_size, spec.largest) - (stop - start)
    for number in range(len(evaluation_pass)):
        batch = evaluation_pass.make(number, start, stop, dummies)
        yield to_device(batch, image, runtime.device), batch


def count_unusable(batch: Batch) -> int:
    """Number of samples of a held-out batch that were left out because of their content."""
    return sum(sum(reasons.values()) for reasons in batch.skipped.values())


def report_left_out(path: str, counted: float, left_out: float, runtime: Runtime) -> None:
    """Print on rank 0 how many samples were left out. Raises UserError if nothing was `counted`."""
    if not counted:
        raise UserError(
            f"eval: {path}: no usable sample ({left_out:.0f} unusable); inspect it with: dromos data show {path}"
        )
    if left_out and runtime.rank == 0:
        print(f"dromos: evaluation of {path}: {left_out:.0f} unusable samples were left out", flush=True)


def shuffled_images(rows: DeviceBatch) -> DeviceBatch:
    """The same captions, each with the image of another row: images are rolled by one among rows of weight > 0.

    If only one row has weight > 0, it keeps its image.
    """
    assert rows.images is not None
    order = torch.arange(len(rows), device=rows.tokens.device)
    used_rows = torch.nonzero(rows.weights > 0)[:, 0]
    order[used_rows] = torch.roll(used_rows, 1)
    return replace(rows, images=rows.images[order])
