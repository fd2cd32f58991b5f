"""FLIP (Li et al. 2023): contrastive training of an image and a text tower on masked images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import xxhash
from torch import Tensor

from data_pipeline.batches.spec import Batch
from pretrain.losses.contrastive import contrastive, repeated_caption_floor
from pretrain.losses.normalisation import count_rows, part_of_global_mean
from pretrain.models.masking import keep_patches
from pretrain.objectives.base import Forward, Loss
from pretrain.objectives.device_batch import DeviceBatch
from pretrain.recipe.lengths import main_stream
from pretrain.recipe.schema import TrainStage

if TYPE_CHECKING:
    from pretrain.models.clip import Clip


class Flip:
    """Contrastive loss of masked images and captions; negatives come from the whole global batch."""

    def __init__(self, model: Clip, stage: TrainStage) -> None:
        self.model = model
        self.main = main_stream(stage)
        self.streams = (self.main,)
        self.mask = stage.objective.image_mask

    def loss_denominator(self, stream: str, batch: Batch) -> float:
        return count_rows(batch)

    def loss(self, forward: Forward, stream: str, rows: DeviceBatch, loss_denominator: float) -> Loss:
        keep = keep_patches(rows.keys, self.model.patches, self.mask)
        out = forward(images=rows.images, tokens=rows.tokens, keep=keep)
        row_sum = contrastive(out["image"], out["text"], out["scale"], rows.sample_ids)
        total = part_of_global_mean(row_sum, loss_denominator)
        return Loss(total, {f"loss/{stream}": total.detach()})

    def metrics(self, batches: Mapping[str, Sequence[Batch]], device: torch.device) -> dict[str, float]:
        keys = caption_keys(batches[self.main]).to(device)
        return {"loss_floor": float(repeated_caption_floor(keys))}

    def frozen(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if not p.requires_grad}


def caption_keys(batches: Sequence[Batch]) -> Tensor:
    """int64 `[rows]` of all batches together, equal for equal captions."""
    keys = [xxhash.xxh64_intdigest(row.tobytes()) for batch in batches for row in batch.tokens]
    return torch.tensor([key - (1 << 64) if key >= 1 << 63 else key for key in keys], dtype=torch.int64)
