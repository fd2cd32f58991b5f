"""Mean negative log-likelihood (NLL) per token of a held-out source, in nats."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import cast

import torch

from data_pipeline.batches.spec import StreamSpec
from pretrain.build.streams import evaluation_spec
from pretrain.distributed.collectives import all_sum
from pretrain.evaluate.held_out import (
    count_unusable,
    open_pass,
    rank_slices,
    report_left_out,
    shuffled_images,
)
from pretrain.evaluate.measure import Context
from pretrain.objectives.base import TokenNll
from pretrain.recipe.schema import TrainStage
from pretrain.recipe.sections.data import Stream
from pretrain.recipe.sections.evaluation import Evaluation, Perplexity


@dataclass(frozen=True)
class PerplexityMeasure:
    """NLL per token of text, or of captions after their images.

    shuffle: give every caption the image of another sample, which measures how much of the caption the text alone
    predicts; only tasks with images, and only on request
    """

    shuffle: bool = False
    needs = ("nll",)

    @property
    def on_request(self) -> bool:
        return self.shuffle

    def tasks(self, evaluation: Evaluation, stage: TrainStage) -> Mapping[str, Perplexity]:
        """All but those of a stream that the stage does not have, and of one without images if they are shuffled."""
        return {
            name: task
            for name, task in evaluation.of(Perplexity).items()
            if (task.stream is None or task.stream in stage.data)
            and not (self.shuffle and (task.stream is None or stage.data[task.stream].image is None))
        }

    def spec(self, task: Perplexity, stage: TrainStage, batch: int) -> StreamSpec:
        return evaluation_spec("held_out", task, _stream(task, stage), batch, task.length)

    def run(self, context: Context, task: Perplexity) -> float:
        return token_nll(context, task, self.spec(task, context.stage, context.batch), self.shuffle)

    def scalars(self, result: float) -> dict[str, float]:
        return {"nll": result}


def _stream(task: Perplexity, stage: TrainStage) -> Stream | None:
    """The stream whose image and text settings apply; None for packed text."""
    return stage.data[task.stream] if task.stream is not None else None


def token_nll(context: Context, task: Perplexity, spec: StreamSpec, shuffle: bool = False) -> float:
    """Mean NLL per token over all ranks, in nats. Collective."""
    stream, runtime = _stream(task, context.stage), context.runtime
    image = stream.image if stream is not None else None
    nll_of = cast(TokenNll, context.predict["nll"])
    total = torch.zeros(3, dtype=torch.float64, device=runtime.device)
    with torch.no_grad(), closing(open_pass(spec, context.cache)) as evaluation_pass:
        for rows, host_batch in rank_slices(evaluation_pass, spec, image, runtime):
            inputs = shuffled_images(rows) if shuffle else rows
            nll, targets = nll_of(context.forward, inputs)
            total[0] += (nll.double() * (rows.weights > 0)).sum()
            total[1] += (targets * (rows.weights > 0)).sum()
            total[2] += count_unusable(host_batch)
    nats, tokens, left_out = all_sum(total).tolist()
    report_left_out(task.path, tokens, left_out, runtime)
    return float(nats / tokens)
