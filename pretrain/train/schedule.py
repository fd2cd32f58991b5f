"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from pretrain.recipe.schema import Optimizer, Schedule


def peak_rate(optimizer: Optimizer, batch: int) -> float:
    """`lr`, or `lr_per_256` scaled linearly with the global batch (Goyal et al. 2017, as FLIP does).

    `batch` is the largest global batch of a ramp-up, so that the peak is the rate of the full batch.
    """
    if optimizer.lr is not None:
        return optimizer.lr
    if optimizer.lr_per_256 is None:
        raise ValueError("optimizer: write lr or lr_per_256")
    return optimizer.lr_per_256 * batch / 256


def learning_rate(step: int, total: int, warmup: float, peak: float, schedule: Schedule) -> float:
    """Learning rate of `step` in [0, total).

    For step < warmup: peak * (step + 1) / (warmup + 1), so the first step has a rate above 0. Step `warmup` has the
    peak; then the rate decays to `schedule.final_lr`, which it would reach at step `total`.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule.kind == "constant" or total <= warmup:
        return peak
    progress = min(1.0, (step - warmup) / max(1.0, total - warmup))
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1 - progress
    return schedule.final_lr + (peak - schedule.final_lr) * decay
