"""The contract of an objective: which streams a step needs, and how their batches become losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.batches.spec import Batch
from pretrain.objectives.device_batch import DeviceBatch

Forward = Callable[..., Any]
"""The model's forward: the engine in training, the module itself elsewhere."""


@dataclass(frozen=True)
class Loss:
    """One micro-batch's loss: `total` is this rank's part of a sum over all ranks; `parts` are named scalars of it."""

    total: Tensor
    parts: dict[str, Tensor]


class Objective(Protocol):
    """What the loop knows of a training objective."""

    main: str
    """The stream whose samples measure the length of the training."""

    @property
    def model(self) -> nn.Module:
        """What the engine trains."""

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams of every step, in the order of their backwards: a function of the recipe alone."""

    def count(self, stream: str, batch: Batch) -> float:
        """This rank's part of the denominator of the stream's loss."""

    def loss(self, forward: Forward, stream: str, rows: DeviceBatch, count: float) -> Loss:
        """The loss of one micro-batch; `count` is the denominator summed over micro-batches and ranks."""

    def figures(self, batches: Mapping[str, Sequence[Batch]], device: torch.device) -> dict[str, float]:
        """Results of the step besides its losses, computed over all ranks; `batches` are this rank's by stream."""

    def frozen(self) -> dict[str, Tensor]:
        """Named tensors that this stage uses and does not train."""


def loss_tokens(batch: Batch) -> float:
    """Tokens that a next-token loss counts: all but the first of each row, zero-weight rows left out."""
    return float(np.sum((batch.used.astype(np.int64) - 1).clip(min=0) * (batch.weights > 0)))
