"""Mean negative log-likelihood (NLL) per token of a held-out source, in nats."""

from __future__ import annotations

from contextlib import closing

import torch

from data_pipeline.batches.evaluation_pass import EvaluationPass
from data_pipeline.storage.cache import CacheSettings
from pretrain.build.streams import evaluation_spec
from pretrain.distributed.collectives import all_sum
from pretrain.distributed.engine import Runtime
from pretrain.evaluate.held_out import count_unusable, rank_slices, report_left_out, shuffled_images
from pretrain.losses.normalisation import count_targets
from pretrain.objectives.base import Forward
from pretrain.objectives.sphinx import Sphinx
from pretrain.recipe.data import Stream
from pretrain.recipe.schema import Perplexity


def token_nll(
    objective: Sphinx,
    forward: Forward,
    task: Perplexity,
    stream: Stream | None,
    batch: int,
    runtime: Runtime,
    shuffle: bool = False,
    cache: CacheSettings | None = None,
) -> float:
    """Mean NLL per token over all ranks, in nats. Collective.

    `stream` has the image and text settings; None: packed text. `batch`: rows over all ranks. `shuffle` gives every
    caption the image of another sample, which measures how much of the caption the text alone predicts.
    """
    spec = evaluation_spec("held_out", task, stream, batch)
    image = stream.image if stream is not None else None
    total = torch.zeros(3, dtype=torch.float64, device=runtime.device)
    with torch.no_grad(), closing(EvaluationPass(spec, cache=cache)) as evaluation_pass:
        for rows, host_batch in rank_slices(evaluation_pass, spec, image, runtime):
            inputs = shuffled_images(rows) if shuffle else rows
            nll = objective.token_nll(forward, inputs)
            total[0] += (nll.double() * (rows.weights > 0)).sum()
            total[1] += count_targets(host_batch)
            total[2] += count_unusable(host_batch)
    nats, tokens, left_out = all_sum(total).tolist()
    report_left_out(task.path, tokens, left_out, runtime)
    return nats / tokens
