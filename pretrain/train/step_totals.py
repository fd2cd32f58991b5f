"""What all ranks know of a step before its forward: counts, digests, replaced samples, who wants to stop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from data_pipeline.batches.spec import Batch
from data_pipeline.order.digest import hex16
from pretrain.distributed.collectives import all_sum, gather
from pretrain.objectives.base import Objective

LOW = (1 << 32) - 1
StepBatches = dict[str, list[Batch]]


class StepTotals:
    """The same on every rank: one all-reduce of integers, and a second exchange only where samples were replaced.

    counts, rows:   by stream, the loss's denominator and the samples of the global batch
    samples, skipped: by source, samples served, and replaced ones by reason; bad names each of those
    stop, failed:   whether any rank was asked to stop, or could not read its data
    """

    def __init__(
        self,
        objective: Objective,
        sources: Sequence[str],
        batches: StepBatches,
        stop: bool,
        failed: bool,
        device: torch.device,
    ) -> None:
        flat = [batch for made in batches.values() for batch in made]
        streams = objective.streams
        skipped = sum(sum(reasons.values()) for batch in flat for reasons in batch.skipped.values())
        numbers = [int(stop), int(failed), skipped]
        # Digests are sums mod 2^64: halves of 32 bits add without overflow.
        for digest in (sum(b.batch_digest for b in flat), sum(b.order_digest for b in flat)):
            numbers += [digest & LOW, digest >> 32 & LOW]
        numbers += [int(sum(objective.count(name, b) for b in batches[name])) for name in streams]
        numbers += [sum(b.stop - b.start for b in batches[name]) for name in streams]
        numbers += [sum(b.samples.get(source, 0) for b in flat) for source in sources]
        values = iter(all_sum(torch.tensor(numbers, dtype=torch.int64, device=device)).tolist())
        self.stop, self.failed = next(values) > 0, next(values) > 0
        replaced = next(values)
        self.batch_digest, self.order_digest = (
            hex16((next(values) + (next(values) << 32)) & ((1 << 64) - 1)) for _ in range(2)
        )
        self.counts = {name: next(values) for name in streams}
        self.rows = {name: next(values) for name in streams}
        self.samples = {source: next(values) for source in sources}
        self.skipped, self.bad = _replaced(flat) if replaced else ({}, [])


def _replaced(batches: list[Batch]) -> tuple[dict[str, dict[str, int]], list[dict[str, Any]]]:
    """Replaced samples over all ranks, by source and reason, and each by name in row order."""
    mine = [(batch.skipped, batch.bad) for batch in batches]
    reasons: dict[str, Counter[str]] = {}
    bad: list[dict[str, Any]] = []
    for part in gather(mine):
        for skipped, named in part:
            bad += named
            for source, found in skipped.items():
                reasons.setdefault(source, Counter()).update(found)
    return {source: dict(sorted(found.items())) for source, found in sorted(reasons.items())}, bad
