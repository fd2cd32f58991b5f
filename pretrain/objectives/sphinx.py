"""SPHINX (Lin et al. 2023): every step trains on text and on captioned images.

Text and captions each have their own mean loss per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from data_pipeline.batches.spec import Batch
from pretrain.losses.normalisation import count_targets, part_of_global_mean
from pretrain.models.encoders.clip_tower import FrozenTower
from pretrain.models.multimodal import Multimodal
from pretrain.objectives.base import Forward, Loss
from pretrain.objectives.device_batch import DeviceBatch
from pretrain.recipe.lengths import main_stream
from pretrain.recipe.schema import TrainStage


class Sphinx:
    """Next-token loss over text and captions. Text streams come first in every step, on every rank."""

    def __init__(self, model: Multimodal, tower: FrozenTower | None, stage: TrainStage) -> None:
        self.model, self.tower = model, tower
        text = [name for name, stream in stage.data.items() if stream.image is None]
        captions = [name for name, stream in stage.data.items() if stream.image is not None]
        self.streams = (*text, *captions)
        self.main = main_stream(stage)
        weights = stage.objective.weights or {}
        self.weights = {name: weights.get(name, 1.0) for name in self.streams}

    def loss_denominator(self, stream: str, batch: Batch) -> float:
        return count_targets(batch)

    def features(self, rows: DeviceBatch) -> Tensor | None:
        """Visual tokens `[rows, tokens, width]` of the frozen tower; None for text."""
        if rows.images is None:
            return None
        assert self.tower is not None, "an image stream needs model.vision"
        with torch.no_grad():
            return self.tower(rows.images)

    def token_nll(self, forward: Forward, rows: DeviceBatch) -> Tensor:
        """Summed negative log-likelihood of each row's tokens, `[rows]`, in nats; skips all-padding columns."""
        return forward(tokens=rows.tokens[:, : rows.longest], used=rows.used, features=self.features(rows))

    def loss(self, forward: Forward, stream: str, rows: DeviceBatch, loss_denominator: float) -> Loss:
        nll = self.token_nll(forward, rows)
        mean = part_of_global_mean((nll * (rows.weights > 0)).sum(), loss_denominator)
        return Loss(self.weights[stream] * mean, {f"loss/{stream}": mean.detach()})

    def metrics(self, batches: Mapping[str, Sequence[Batch]], device: torch.device) -> dict[str, float]:
        return {}

    def frozen(self) -> dict[str, Tensor]:
        tensors = {name: p.detach() for name, p in self.model.named_parameters() if not p.requires_grad}
        if self.tower is not None:
            tensors |= {f"vision.0.{name}": p.detach() for name, p in self.tower.visual.state_dict().items()}
        return tensors
