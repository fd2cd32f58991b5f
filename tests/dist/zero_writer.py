"""One rank of test_zero_shards.py: writes small DeepSpeed checkpoints, and DeepSpeed's own reading of them.

`main` runs in a forked process with RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* set. A name is zero{0,1,2,3}_{fp32,bf16},
plus `_all` if frozen parameters are saved too, or `_accumulated` if gradients accumulate in fp32 (DeepSpeed's
BF16_Optimizer). It writes OUT/NAME/step and, on rank 0, OUT/NAME/reference.npz: every parameter and buffer in fp32.
zero_to_fp32 cannot read `_accumulated`; its reference holds the rounded values of the module.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pretrain.train.main import exit_now


class Odd(nn.Module):
    """Shapes that no world size divides, a tied weight, a frozen layer, float and integer buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.body = nn.Linear(5, 3)
        self.norm = nn.LayerNorm(3)
        self.second_norm = nn.LayerNorm(3)
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
        hidden = self.norm(self.body(self.embed(tokens)))
        hidden = self.second_norm(hidden + self.running.to(hidden.dtype))
        return self.head(self.up(self.frozen(hidden))) * self.scale


def write(deepspeed: Any, out: Path, stage: int, dtype: str, kind: str, seed: int) -> None:
    """Three training steps, then a checkpoint saved as pretrain/distributed/engine.py does."""
    torch.manual_seed(seed)
    model = Odd()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    config = {
        "train_micro_batch_size_per_gpu": 4 // world,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 1 << 31,
        "bf16": {"enabled": dtype == "bf16"},
    }
    if kind == "accumulated":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    names = {id(p): n for n, p in model.named_parameters()}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    tokens = torch.arange(4 * 6).reshape(4, 6) % 7
    for _ in range(3):
        rows = tokens[rank * 4 // world : (rank + 1) * 4 // world]
        loss = nn.functional.cross_entropy(engine(rows).float().flatten(0, 1), (rows.flatten() + 1) % 7)
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(out), tag="step", save_latest=False, exclude_frozen_parameters=kind != "all")
    if rank == 0:
        np.savez(out / "reference.npz", **reference(engine, out, stage, kind, names))


def reference(engine: Any, out: Path, stage: int, kind: str, names: dict[int, str]) -> dict[str, Any]:
    """Stages 1 to 3: the tensors that DeepSpeed's zero_to_fp32 reads; stage 0: the live parameters and masters."""
    if kind == "accumulated":
        state = {n: t for n, t in engine.module.state_dict().items() if not n.startswith("frozen.")}
    elif stage == 0:
        state = {n: t for n, t in engine.module.state_dict().items() if not n.startswith("frozen.")}
        wrapper = engine.optimizer
        if hasattr(wrapper, "fp32_groups"):
            for params, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
                state |= {names[id(p)]: m for p, m in zip(params, masters, strict=True)}
            state["head.weight"] = state["embed.weight"]
    else:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with (
            open(os.devnull, "w") as void,
            contextlib.redirect_stdout(void),
            contextlib.redirect_stderr(void),
        ):
            state = get_fp32_state_dict_from_zero_checkpoint(str(out), tag="step")
        if kind == "all" and stage == 1:  # zero_to_fp32 omits them; the module holds them
            state |= {n: t for n, t in engine.module.state_dict().items() if n.startswith("frozen.")}
    return {n: (t.float() if t.is_floating_point() else t).detach().numpy() for n, t in state.items()}


def main(out: str, seed: int, names: list[str]) -> None:
    import deepspeed
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False, auto_mpi_discovery=False)
    for name in names:
        stage, dtype, *rest = name.removeprefix("zero").split("_")
        write(deepspeed, Path(out) / name, int(stage), dtype, "".join(rest), seed)
    torch.distributed.destroy_process_group()
    exit_now(0)


def convert(folder: str, out: str) -> None:
    """Write a universal checkpoint, as `python -m deepspeed.checkpoint.ds_to_universal` does."""
    sys.argv = [
        "ds_to_universal", "--inject_missing_state", "--input_folder", folder, "--output_folder", out,
        "--num_extract_workers", "1", "--num_merge_workers", "1",
    ]  # fmt: skip
    runpy.run_module("deepspeed.checkpoint.ds_to_universal", run_name="__main__")
