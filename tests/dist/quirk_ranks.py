"""One rank that reproduces DeepSpeed's problems on a toy model, without our Engine; prints one JSON object."""

from __future__ import annotations

import json
import sys

import torch
from torch import nn

from pretrain.distributed.engine import import_deepspeed, join_process_group, leave_process_group

STEPS = 3


class Toy(nn.Module):
    """Two layers: `late` gets gradients only from the second stream."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.early, self.late = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, second: bool) -> torch.Tensor:
        return (self.late(self.early(x)) if second else self.early(x)).square().mean()


def batches(rank: int, step: int) -> list[tuple[torch.Tensor, bool]]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [(torch.randn(4, 8, generator=generator), second) for second in (False, True)]


def reference(world: int) -> dict[str, torch.Tensor]:
    """SGD on the mean over ranks of the sum of both losses, in one process."""
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(world):
            for x, second in batches(rank, step):
                (model(x, second) / world).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trained(zero: int, managed: bool, rank: int) -> dict[str, torch.Tensor]:
    deepspeed = import_deepspeed()
    model = Toy()
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "steps_per_print": 1 << 31,
        "managed_gradient_accumulation": managed, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": zero, "overlap_comm": False},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5), config=config
    )
    for step in range(STEPS):
        if managed:
            with engine.coalesce_grad_reduction():
                for x, second in batches(rank, step):
                    engine.backward(engine(x, second), scale_wrt_gas=False)
        else:
            for x, second in batches(rank, step):
                engine.backward(engine(x, second), scale_wrt_gas=False)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def scalar_error() -> str:
    """The error of deepspeed.initialize with a 0-dim parameter, "" if there is none."""
    model = Toy()
    model.scale = nn.Parameter(torch.tensor(1.0))
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    try:
        optimizer = torch.optim.AdamW(model.parameters())
        import_deepspeed().initialize(model=model, optimizer=optimizer, config=config)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def main(_jobs: list[dict]) -> None:
    runtime = join_process_group()
    expected = reference(runtime.world_size)
    found = {
        "naive": {zero: worst(trained(zero, False, runtime.rank), expected) for zero in (0, 1, 2, 3)},
        "coalesced": {zero: worst(trained(zero, True, runtime.rank), expected) for zero in (1, 2, 3)},
        "scalar_error": scalar_error(),
    }
    if runtime.rank == 0:
        print("FOUND " + json.dumps(found), flush=True)
    sys.stdout.flush()
    leave_process_group()
