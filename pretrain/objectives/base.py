"""The interface that the training loop needs from an objective: streams, loss denominators, losses, metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from data_pipeline.batches.spec import Batch
from pretrain.objectives.device_batch import DeviceBatch

# The model's forward: the engine in training, the module itself elsewhere.
Forward = Callable[..., Any]


@dataclass(frozen=True)
class Loss:
    """The loss of one micro-batch.

    total: its sum over all streams, micro-batches and ranks is the step's loss; the loop calls engine.backward(total).
    parts: detached scalars by name; their sums over all micro-batches and ranks are in metrics.jsonl.
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

    def loss_denominator(self, stream: str, batch: Batch) -> float:
        """One micro-batch's part of the denominator of the stream's loss, in rows or tokens.

        `StepTotals` sums the parts of all micro-batches and ranks before the forward pass.
        """

    def loss(self, forward: Forward, stream: str, rows: DeviceBatch, loss_denominator: float) -> Loss:
        """The loss of one micro-batch.

        It is divided by `loss_denominator`, the stream's total number of rows or tokens in the global batch.
        """

    def metrics(self, batches: Mapping[str, Sequence[Batch]], device: torch.device) -> dict[str, float]:
        """Other scalars of the step for metrics.jsonl, equal on all ranks; `batches` are this rank's, by stream."""

    def frozen(self) -> dict[str, Tensor]:
        """Named tensors that the stage uses but does not train; they go into frozen.safetensors."""
