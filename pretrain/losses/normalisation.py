"""Where a loss is divided, and by what: every loss is a mean over the global batch.

An objective computes the sum of a micro-batch's losses and divides it by a denominator that `StepTotals`
(pretrain/train/step_totals.py) has summed over all micro-batches of all ranks before the forward pass. The quotients of
all micro-batches and ranks sum to the mean over the global batch, for every world size and micro-batch size. A mean per
rank or micro-batch would weigh a token in a short row more than one in a long row.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from data_pipeline.batches.spec import Batch


def part_of_global_mean(local_sum: Tensor, denominator: float) -> Tensor:
    """This micro-batch's part of the mean over the global batch.

    `local_sum`: scalar sum over the rows or tokens of the micro-batch. `denominator`: their number in the global batch.
    ZeRO averages gradients over the ranks; Engine.backward therefore multiplies this part by the world size.
    """
    return local_sum / denominator


def count_rows(batch: Batch) -> float:
    """Number of rows of a micro-batch, without zero-weight rows: the denominator of a loss per row."""
    return float(np.count_nonzero(batch.weights > 0))


def count_targets(batch: Batch) -> float:
    """Number of targets of a next-token loss: all tokens but the first of each row, without zero-weight rows."""
    return float(np.sum((batch.used.astype(np.int64) - 1).clip(min=0) * (batch.weights > 0)))
