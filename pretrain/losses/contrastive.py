"""Exact global contrastive loss: local rows against the features of all ranks, with gradients through the gather."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pretrain.distributed.collectives import all_rows, rank, world_size

# Largest number of logits of one chunk. If the local rows need more than one chunk, the logits of each chunk are
# recomputed in the backward pass.
LOGITS_PER_CHUNK = 1 << 24


class _Gather(torch.autograd.Function):
    """Concatenates the rows of all ranks. The backward sums the gradients of all ranks and returns the local rows.

    It uses all-reduce and a slice instead of reduce-scatter, which gloo does not have.
    """

    @staticmethod
    def forward(ctx, local: Tensor) -> Tensor:  # type: ignore[override]
        ctx.rows = local.shape[0]
        return all_rows(local)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        start = rank() * ctx.rows
        return grad[start : start + ctx.rows]


def gather_rows(local: Tensor) -> Tensor:
    """Concatenate `[rows, ...]` of every rank to `[world_size * rows, ...]`, in rank order; differentiable.

    Every rank must hold the same number of rows.
    """
    return local if world_size() == 1 else _Gather.apply(local)


def _row_losses(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    query_ids: Tensor,
    key_ids: Tensor,
    key_is_real: Tensor,
    positives: Tensor,
) -> Tensor:
    """Cross-entropy of each query's positive among the keys, fp32 `[rows]`; 0 for dummy rows.

    Keys with the sample id of the query, and keys of dummy rows, are not negatives. `positives`: index of each query's
    positive key.
    """
    logits = scale.float() * (queries.float() @ keys.float().T)
    no_negative = (query_ids[:, None] == key_ids[None, :]) | ~key_is_real[None, :]
    # The own key always stays, also that of a dummy row: the log-sum-exp of nothing has no gradient.
    no_negative[torch.arange(len(queries), device=queries.device), positives] = False
    logits = logits.masked_fill(no_negative, float("-inf"))
    positive_logits = logits.gather(1, positives[:, None])[:, 0]
    losses = torch.logsumexp(logits, dim=1) - positive_logits
    return torch.where(key_is_real[positives], losses, 0.0)


def contrastive(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    sample_ids: Tensor,
    block: int = LOGITS_PER_CHUNK,
    weights: Tensor | None = None,
) -> Tensor:
    """Sum over the local rows of the symmetric InfoNCE loss, a 0-dim fp32 tensor.

    `image`, `text`: L2-normalised features `[rows, width]` of this rank. `logit_scale`: the factor itself (already
    exponentiated), one element. `sample_ids`: int64 `[rows]`; rows of the global batch with the same sample id are
    not negatives of each other. `block`: largest number of logits of one chunk of rows. Every rank must hold the same
    number of rows; a rank that has fewer adds dummy rows, with any finite features and `weights` 0. `weights`: float
    `[rows]`; a row of weight 0 has no loss and is no negative, every other row counts as one; None: there are no dummy
    rows on any rank. Divide the result by the rows of the global batch for the mean over rows, without dummy rows; if
    the engine averages gradients over ranks, as DeepSpeed does, also multiply by the world size. Log-sum-exp is in
    fp32 (Radford et al. 2021; FLIP, Li et al. 2023).
    """
    rows = image.shape[0]
    if world_size() == 1:
        all_image, all_text = image, text
    else:
        both = gather_rows(torch.cat([image, text], dim=1))
        all_image, all_text = both.split([image.shape[1], text.shape[1]], dim=1)
    is_real = torch.ones_like(sample_ids) if weights is None else (weights > 0).to(sample_ids.dtype)
    all_ids, all_real = all_rows(torch.stack([sample_ids, is_real], dim=1)).unbind(1)
    key_is_real = all_real > 0
    positives = torch.arange(rows, device=image.device) + rank() * rows
    chunk = max(1, min(rows, block // max(1, len(all_ids))))
    total = image.new_zeros((), dtype=torch.float32)
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        for queries, keys in ((image, all_text), (text, all_image)):
            ids = (sample_ids[part], all_ids)
            arguments = (queries[part], keys, logit_scale, *ids, key_is_real, positives[part])
            losses = (
                _row_losses(*arguments)
                if chunk == rows
                else checkpoint(_row_losses, *arguments, use_reentrant=False)
            )
            total = total + losses.sum()
    return total / 2


def repeated_caption_floor(caption_keys: Tensor, weights: Tensor | None = None) -> Tensor:
    """Lower bound of the loss due to repeated captions: mean over all rows of ln(rows with the same caption).

    `caption_keys`: int64 `[rows]` of this rank, equal for equal captions. `weights`: float `[rows]`, 0 for dummy rows;
    None: there are none on any rank. The result is over all ranks, in nats.
    """
    is_real = torch.ones_like(caption_keys) if weights is None else (weights > 0).to(caption_keys.dtype)
    keys, real = all_rows(torch.stack([caption_keys, is_real], dim=1)).unbind(1)
    counts = keys[real > 0].unique(return_counts=True)[1].double()
    return (counts * counts.log()).sum() / counts.sum()
