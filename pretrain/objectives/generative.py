"""Next-token training of a language model on text and on captioned images in every step (SPHINX, Lin et al. 2023).

Each stream has its own mean loss per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from data_pipeline.batches.spec import Batch
from pretrain.losses.normalisation import count_targets, part_of_global_mean
from pretrain.models.vision_language import VisionLanguageModel, greedy_captions
from pretrain.objectives.base import Forward, Loss, Objective
from pretrain.objectives.device_batch import DeviceBatch
from pretrain.recipe.kinds.generative import GenerativeOptions
from pretrain.recipe.lengths import main_stream
from pretrain.recipe.schema import TrainStage


class Generative(Objective):
    """Next-token loss over text and captions. Text streams come first in every step, on every rank."""

    exports = ("transformers",)

    def __init__(self, model: VisionLanguageModel, stage: TrainStage) -> None:
        self.model: VisionLanguageModel = model
        text = [name for name, stream in stage.data.items() if stream.image is None]
        captions = [name for name, stream in stage.data.items() if stream.image is not None]
        self.streams = (*text, *captions)
        self.with_images = frozenset(captions)
        self.main = main_stream(stage)
        weights = stage.options(GenerativeOptions).weights or {}
        self.weights = {name: weights.get(name, 1.0) for name in self.streams}

    @property
    def predict(self) -> Mapping[str, Callable[..., object]]:
        return {"nll": self.nll, "generate": self.generate}

    def loss_denominator(self, stream: str, batch: Batch) -> float:
        return count_targets(batch)

    def token_nll(self, forward: Forward, rows: DeviceBatch) -> Tensor:
        """Summed negative log-likelihood of each row's tokens, `[rows]`, in nats; skips all-padding columns."""
        return forward(tokens=rows.tokens[:, : rows.longest], used=rows.used, images=rows.images)

    def nll(self, forward: Forward, rows: DeviceBatch) -> tuple[Tensor, Tensor]:
        """`token_nll`, and the number of tokens of each row that it covers, int64 `[rows]`."""
        return self.token_nll(forward, rows), (rows.used - 1).clamp(min=0)

    def loss(self, forward: Forward, stream: str, rows: DeviceBatch, loss_denominator: float) -> Loss:
        nll = self.token_nll(forward, rows)
        mean = part_of_global_mean((nll * (rows.weights > 0)).sum(), loss_denominator)
        return Loss(self.weights[stream] * mean, {f"loss/{stream}": mean.detach()})

    def generate(self, rows: DeviceBatch, start: int, end: int, max_tokens: int) -> list[list[int]]:
        """Greedy tokens after the images of the rows, at most `max_tokens` each, without start and end tokens.

        `start`, `end`: token ids.
        """
        assert rows.images is not None, "captions are generated for images"
        return greedy_captions(self.model, start, end, rows.images, max_tokens)

    def visual_tokens(self, stream: str) -> int:
        encoder = self.model.encoder
        return (
            encoder.token_count + 2 if encoder is not None and stream in self.with_images else 0
        )  # 2 delimiters

    @property
    def max_length(self) -> int | None:
        return self.model.language_model.max_length
