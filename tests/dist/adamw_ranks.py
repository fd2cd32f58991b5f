"""One rank that trains a toy with exact gradients through our Engine, and continues with other optimizer options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pretrain.distributed.engine import Engine, join_process_group, leave_process_group

STEPS = 3  # before and after the continuation


@dataclass(frozen=True)
class Options:
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float


FIRST = Options((0.9, 0.95), 1e-8, 0.1, 3.0)
SECOND = Options((0.6, 0.8), 1e-1, 0.4, 1.5)


class Sums(nn.Module):
    """Its gradients are its inputs: small integers, which bf16 and every order of summation represent exactly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.bias = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.weight * x).sum() + (self.bias * y).sum()


def inputs(step: int, rank: int) -> list[tuple[Tensor, Tensor]]:
    """The gradients of two backward passes."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [
        (torch.randint(-3, 4, (5, 3), generator=generator), torch.randint(-3, 4, (7,), generator=generator))
        for _ in range(2)
    ]


def rate(step: int) -> float:
    return 0.01 * (step + 1)


def train(engine: Engine, steps: range, rank: int, folder: Path) -> None:
    dtype = next(engine.module.parameters()).dtype
    for step in steps:
        engine.train()
        with engine.accumulate():
            for x, y in inputs(step, rank):
                engine.backward(engine(x.to(dtype), y.to(dtype)))
        assert engine.step(rate(step)) is not None
        engine.save(folder, f"step-{step}")


def main(jobs: list[tuple[int, str, str]]) -> None:
    runtime = join_process_group()
    for zero, dtype, name in jobs:
        folder, last = Path(name), 2 * STEPS
        for options, steps in ((FIRST, range(STEPS)), (SECOND, range(STEPS, last))):
            given = (options.betas, options.eps, options.weight_decay, options.clip)
            engine = Engine(Sums(), zero, dtype, *given, runtime)
            if steps[0]:
                engine.load(folder, f"step-{steps[0] - 1}")
            train(engine, steps, runtime.rank, folder)
    leave_process_group()
