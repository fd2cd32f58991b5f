"""Mean negative log-likelihood a token of a held-out source, in nats."""

from __future__ import annotations

from contextlib import closing

import torch

from data_pipeline.batches.evaluation_pass import EvaluationPass
from data_pipeline.storage.cache import CacheSettings
from pretrain.build.streams import evaluation_spec
from pretrain.distributed.collectives import all_sum
from pretrain.distributed.engine import Runtime
from pretrain.evaluate.held_out import passes, shuffled_images, tell_left_out, unusable
from pretrain.objectives.base import Forward, loss_tokens
from pretrain.objectives.sphinx import Sphinx
from pretrain.recipe.data import Stream
from pretrain.recipe.schema import Perplexity


def token_nll(
    objective: Sphinx,
    forward: Forward,
    wanted: Perplexity,
    stream: Stream | None,
    batch: int,
    runtime: Runtime,
    shuffle: bool = False,
    cache: CacheSettings | None = None,
) -> float:
    """Sum of the tokens' negative log-likelihoods over their number, all ranks together.

    `shuffle` gives every caption another sample's image: what the text alone explains.
    """
    spec = evaluation_spec("held_out", wanted, stream, batch)
    image = stream.image if stream is not None else None
    total = torch.zeros(3, dtype=torch.float64, device=runtime.device)
    with torch.no_grad(), closing(EvaluationPass(spec, cache=cache)) as builder:
        for rows, made in passes(builder, spec, image, runtime):
            shown = shuffled_images(rows) if shuffle else rows
            nll = objective.token_nll(forward, shown)
            total[0] += (nll.double() * (rows.weights > 0)).sum()
            total[1] += loss_tokens(made)
            total[2] += unusable(made)
    nats, tokens, left_out = all_sum(total).tolist()
    tell_left_out(wanted.path, tokens, left_out, runtime)
    return nats / tokens
