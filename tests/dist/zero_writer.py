"""One rank that writes small DeepSpeed checkpoints for tests/dist/test_zero_shards.py: every ZeRO stage and dtype.

Started as `python -m tests.dist.zero_writer OUT SEED` with RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* set; writes
OUT/zero{0,1,2,3}_{fp32,bf16}/step, and on rank 0 the parameters as the engine holds them, OUT/NAME/live.npz.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn


class Odd(nn.Module):
    """Shapes that no world size divides, a tied weight, a frozen layer, float and integer buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.body = nn.Linear(5, 3)
        self.norm = nn.LayerNorm(3)
        self.frozen = nn.Linear(3, 11)
        self.frozen.requires_grad_(False)
        self.up = nn.Linear(11, 5, bias=False)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor([0.7]))
        self.register_buffer("running", torch.randn(3))
        self.register_buffer("count", torch.tensor([3, 2**40], dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.body(self.embed(tokens))) + self.running.to(self.body.weight.dtype)
        return self.head(self.up(self.frozen(hidden))) * self.scale


def write(out: Path, stage: int, dtype: str, seed: int) -> None:
    """Train three steps and save as pretrain/engine.py does; the step counter is in client_state as there."""
    import deepspeed

    torch.manual_seed(seed)
    model = Odd()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for _, p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    config = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 4 // world,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "bf16": {"enabled": dtype == "bf16"},
    }
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    tokens = torch.arange(4 * 6).reshape(4, 6) % 7
    for _ in range(3):
        rows = tokens[rank * 4 // world : (rank + 1) * 4 // world]
        loss = nn.functional.cross_entropy(engine(rows).float().flatten(0, 1), (rows.flatten() + 1) % 7)
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(
        str(out), tag="step", client_state={"ours": {"step": 3}}, save_latest=False, exclude_frozen_parameters=True
    )


def main() -> None:
    out, seed = Path(sys.argv[1]), int(sys.argv[2])
    names = sys.argv[3:]
    import deepspeed
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    for name in names:
        stage, dtype = name.removeprefix("zero").split("_")
        write(out / name, int(stage), dtype, seed)


if __name__ == "__main__":
    main()
