"""The contract between the training loop and an objective: streams per step, loss counts, losses, figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.batches.spec import Batch
from pretrain.objectives.device_batch import DeviceBatch

# The model's forward: the engine in training, the module itself elsewhere.
Forward = Callable[..., Any]


@dataclass(frozen=True)
class Loss:
    """The loss of one micro-batch.

    total: this rank's part of the sum over all ranks; the loop calls its backward.
    parts: detached named scalars for metrics.jsonl, also parts of a sum over ranks.
    """

    total: Tensor
    parts: dict[str, Tensor]


class Objective(Protocol):
    """A training objective: its model, and the conversion from batches to losses."""

    main: str
    """Name of the stream whose samples measure the length of the training."""

    @property
    def model(self) -> nn.Module:
        """The module that the engine trains."""

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams of every step in the order of their backward passes, which must be the same on every rank."""

    def count(self, stream: str, batch: Batch) -> float:
        """This rank's part of the denominator of the stream's loss: rows or tokens."""

    def loss(self, forward: Forward, stream: str, rows: DeviceBatch, count: float) -> Loss:
        """The loss of one micro-batch; `count` is the denominator, summed over micro-batches and ranks."""

    def figures(self, batches: Mapping[str, Sequence[Batch]], device: torch.device) -> dict[str, float]:
        """Other scalars of the step for metrics.jsonl, equal on all ranks; `batches` are this rank's, by stream."""

    def frozen(self) -> dict[str, Tensor]:
        """Named tensors that the stage uses but does not train; they go into frozen.safetensors."""


def loss_tokens(batch: Batch) -> float:
    """Number of targets of a next-token loss: all tokens but the first of each row, without zero-weight rows."""
    return float(np.sum((batch.used.astype(np.int64) - 1).clip(min=0) * (batch.weights > 0)))
