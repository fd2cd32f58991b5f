"""`StepTotals`: one all-reduce per step, before the forward pass.

It sums loss denominators, digests, replaced samples and stop flags over all ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from data_pipeline.batches.spec import Batch
from data_pipeline.order.digest import hex16
from pretrain.distributed.collectives import all_sum, gather
from pretrain.objectives.base import Objective

LOW_32_BITS = (1 << 32) - 1
StepBatches = dict[str, list[Batch]]  # stream -> this rank's micro-batches of one step


class StepTotals:
    """Totals of one step over all ranks, equal on every rank.

    One all-reduce of int64; a second exchange only when a rank replaced samples.

    loss_denominators: stream -> rows or tokens of the global batch; every rank divides its losses by it
    rows:              stream -> rows of the global batch, without the dummy rows of the ranks
    samples:           source -> samples served
    skipped:           source -> reason -> samples replaced
    bad:               the lines of bad_samples.jsonl, one per unusable sample that was tried
    stop:              a rank received a stop signal or reached train.hours
    failed:            a rank could not read its data
    batch_digest, order_digest: 16 hex digits
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
        flat = [batch for of_stream in batches.values() for batch in of_stream]
        streams = objective.streams
        skipped = sum(sum(reasons.values()) for batch in flat for reasons in batch.skipped.values())
        numbers = [int(stop), int(failed), skipped]
        # Digests are sums mod 2^64: halves of 32 bits add without overflow.
        for digest in (sum(b.batch_digest for b in flat), sum(b.order_digest for b in flat)):
            numbers += [digest & LOW_32_BITS, digest >> 32 & LOW_32_BITS]
        numbers += [int(sum(objective.loss_denominator(name, b) for b in batches[name])) for name in streams]
        numbers += [sum(b.stop - b.start for b in batches[name]) for name in streams]
        numbers += [sum(b.samples.get(source, 0) for b in flat) for source in sources]
        values = iter(all_sum(torch.tensor(numbers, dtype=torch.int64, device=device)).tolist())
        # Read back in the order in which `numbers` was filled.
        self.stop, self.failed = next(values) > 0, next(values) > 0
        replaced = next(values)
        self.batch_digest, self.order_digest = (
            hex16((next(values) + (next(values) << 32)) & ((1 << 64) - 1)) for _ in range(2)
        )
        self.loss_denominators = {name: next(values) for name in streams}
        self.rows = {name: next(values) for name in streams}
        self.samples = {source: next(values) for source in sources}
        self.skipped, self.bad = _gather_replaced(flat) if replaced else ({}, [])


def _gather_replaced(batches: list[Batch]) -> tuple[dict[str, dict[str, int]], list[dict[str, Any]]]:
    """Replaced samples of all ranks: counts by source and reason, and one line per try in row order."""
    counts: dict[str, Counter[str]] = {}
    bad: list[dict[str, Any]] = []
    for of_rank in gather([(batch.skipped, batch.bad) for batch in batches]):
        for skipped, lines in of_rank:
            bad += lines
            for source, reasons in skipped.items():
                counts.setdefault(source, Counter()).update(reasons)
    return {source: dict(sorted(reasons.items())) for source, reasons in sorted(counts.items())}, bad
