"""One rank that trains a toy through our Engine, once without and once with steps that must change nothing."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pretrain.distributed.collectives import barrier
from pretrain.distributed.engine import Engine, join_process_group, leave_process_group

# Steps by name; all but those of GOOD must be skipped. `early`: without the second stream, so without a gradient of `late`.
GOOD = ("good", "early")
WITHOUT = ("good", "early", "early", "good", "good")
WITH = ("loss", "good", "gradient", "early", "loss", "early", "constant", "good", "constant", "good", "gradient")


class Toy(nn.Module):
    """Two layers of sizes that two ranks cannot share evenly; `late` is used by the second stream only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.early, self.late = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: torch.Tensor, second: bool, poison: bool) -> torch.Tensor:
        hidden = self.early(x)
        if poison:  # adds 0, whose gradient is 0 times infinity
            hidden = hidden + (hidden * 0).sqrt()
        return (self.late(hidden) if second else hidden).float().square().mean()


def step(engine: Engine, kind: str, number: int, rank: int) -> float | None:
    """One step of two streams; what is wrong is wrong on the last rank only."""
    generator = torch.Generator().manual_seed(100 * number + rank)
    dtype = next(engine.module.parameters()).dtype
    engine.train()
    with engine.accumulate():
        for second in (False,) if kind == "early" else (False, True):
            x = torch.randn(4, 5, generator=generator).to(dtype)
            if kind == "loss" and rank:
                x[0, 0] = math.nan
            loss = engine(x, second, kind == "gradient" and bool(rank) and second) / 2
            if kind == "constant" and rank:
                loss = loss + math.inf
            engine.backward(loss)
    if kind in ("loss", "constant"):
        engine.discard()
        return None
    return engine.step(0.01)


def train(kinds: tuple[str, ...], zero: int, dtype: str, folder: Path, runtime: Any) -> None:
    """Save a checkpoint before and after every skipped step, and `last` after the last step."""
    engine = Engine(Toy(), zero, dtype, (0.9, 0.95), 1e-8, 0.1, 0.5, runtime)
    good = itertools.count()
    for number, kind in enumerate(kinds):
        if kind in GOOD:
            assert step(engine, kind, next(good), runtime.rank) is not None
            continue
        engine.save(folder, f"{number}-before")
        assert step(engine, kind, 1000 + number, runtime.rank) is None, (zero, dtype, kind)
        engine.save(folder, f"{number}-after")
    engine.save(folder, "last")
    barrier()


def main(jobs: list[tuple[int, str, str]]) -> None:
    runtime = join_process_group()
    for zero, dtype, folder in jobs:
        train(WITHOUT, zero, dtype, Path(folder, "without"), runtime)
        train(WITH, zero, dtype, Path(folder, "with"), runtime)
    leave_process_group()
