"""The learning rate of every step, compared with torch's own schedulers."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from pretrain.recipe.schema import Optimizer, Schedule
from pretrain.train.schedule import learning_rate, peak_rate

PEAK = 3e-3


def torch_rates(kind: str, total: int, warmup: int, final: float) -> list[float]:
    """Rates of steps 0..total-1 from torch: linear up to the peak at step `warmup`, then the decay."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=PEAK)
    rest = total - warmup
    decay: LRScheduler
    if kind == "cosine":
        decay = CosineAnnealingLR(optimizer, T_max=rest, eta_min=final)
    elif kind == "linear":
        decay = LinearLR(optimizer, start_factor=1.0, end_factor=final / PEAK, total_iters=rest)
    else:
        decay = ConstantLR(optimizer, factor=1.0)
    schedule: LRScheduler = decay
    if warmup:
        rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        schedule = SequentialLR(optimizer, [rise, decay], milestones=[warmup])
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR still passes an epoch to its parts
        for _ in range(total):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
    return rates


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(20, 0), (20, 3), (101, 10), (4, 3), (1, 0)])
@pytest.mark.parametrize("final", [0.0, 2e-4])
def test_every_rate_equals_that_of_torch(kind: str, total: int, warmup: int, final: float) -> None:
    schedule = Schedule(kind=kind, final_lr=final)
    found = [learning_rate(step, total, warmup, PEAK, schedule) for step in range(total)]
    assert found == pytest.approx(torch_rates(kind, total, warmup, final), rel=1e-12, abs=1e-18)


def test_a_warmup_longer_than_the_training_only_rises() -> None:
    found = [learning_rate(step, 5, 9, PEAK, Schedule()) for step in range(5)]
    assert found == pytest.approx([PEAK * k / 10 for k in (1, 2, 3, 4, 5)])
    assert learning_rate(9, 9, 9, PEAK, Schedule()) == PEAK


def test_the_decay_never_goes_below_its_end() -> None:
    schedule = Schedule(final_lr=1e-4)
    assert learning_rate(10, 10, 2, PEAK, schedule) == pytest.approx(1e-4)
    assert learning_rate(15, 10, 2, PEAK, schedule) == pytest.approx(1e-4)


def test_the_peak_scales_with_the_batch() -> None:
    assert peak_rate(Optimizer(lr=5e-4), batch=4096) == 5e-4
    assert peak_rate(Optimizer(lr_per_256=4e-6), batch=65536) == pytest.approx(1.024e-3)  # FLIP's recipe, 64k
    assert peak_rate(Optimizer(lr_per_256=1e-3), batch=64) == pytest.approx(2.5e-4)
    with pytest.raises(ValueError, match="lr or lr_per_256"):
        peak_rate(Optimizer(), batch=256)
