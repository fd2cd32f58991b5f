"""Contrastive training of an image and a text tower (CLIP), also on masked images (FLIP, Li et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash
from torch import Tensor

from data_pipeline.batches.spec import Batch
from pretrain.losses.contrastive import contrastive, repeated_caption_floor
from pretrain.losses.normalisation import count_rows, part_of_global_mean
from pretrain.models.masking import keep_patches
from pretrain.objectives.base import Forward, GlobalObjective, Loss
from pretrain.objectives.device_batch import DeviceBatch
from pretrain.recipe.kinds.contrastive import ContrastiveOptions
from pretrain.recipe.lengths import main_stream
from pretrain.recipe.schema import TrainStage

if TYPE_CHECKING:
    from pretrain.models.clip import Clip


class Contrastive(GlobalObjective):
    """Contrastive loss of masked images and captions; negatives come from the whole global batch."""

    exports = ("open_clip",)

    def __init__(self, model: Clip, stage: TrainStage) -> None:
        self.model: Clip = model
        self.main = main_stream(stage)
        self.streams = (self.main,)
        self.mask = stage.options(ContrastiveOptions).image_mask

    @property
    def predict(self) -> Mapping[str, Callable[..., object]]:
        return {"embed": embed}

    def loss_denominator(self, stream: str, batch: Batch) -> float:
        return count_rows(batch)

    def features(self, forward: Forward, stream: str, rows: DeviceBatch) -> dict[str, Tensor]:
        """L2-normalised `image` and `text` `[rows, width]`, and the 0-dim factor `scale`.

        `sample_ids`: int64 `[rows]`. `weights`: bool `[rows]`, False for dummy rows.
        """
        keep = keep_patches(rows.keys, self.model.patches, self.mask)
        out = forward(images=rows.images, tokens=rows.tokens, keep=keep)
        return {
            "image": out["image"],
            "text": out["text"],
            "scale": out["scale"].reshape(()),
            "sample_ids": rows.sample_ids,
            "weights": rows.weights > 0,
        }

    def global_loss(self, stream: str, features: Mapping[str, Tensor], loss_denominator: float) -> Loss:
        row_sum = contrastive(
            features["image"],
            features["text"],
            features["scale"],
            features["sample_ids"],
            weights=features["weights"],
        )
        total = part_of_global_mean(row_sum, loss_denominator)
        return Loss(total, {f"loss/{stream}": total.detach()})

    def metrics(self, batches: Mapping[str, Sequence[Batch]], device: torch.device) -> dict[str, float]:
        keys = caption_keys(batches[self.main]).to(device)
        weights = torch.from_numpy(np.concatenate([batch.weights for batch in batches[self.main]])).to(device)
        return {"loss_floor": float(repeated_caption_floor(keys, weights))}


def embed(forward: Forward, images: Tensor | None = None, tokens: Tensor | None = None) -> dict[str, Tensor]:
    """Features `image` of `images` and `text` of `tokens`, `[rows, width]`, L2-normalised; no patch is masked."""
    given = {"images": images, "tokens": tokens}
    out: dict[str, Tensor] = forward(**{name: value for name, value in given.items() if value is not None})
    return out


def caption_keys(batches: Sequence[Batch]) -> Tensor:
    """int64 `[rows]` of all batches together, equal for equal captions."""
    keys = [xxhash.xxh64_intdigest(row.tobytes()) for batch in batches for row in batch.tokens]
    return torch.tensor([key - (1 << 64) if key >= 1 << 63 else key for key in keys], dtype=torch.int64)
