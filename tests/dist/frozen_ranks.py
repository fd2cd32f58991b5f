"""One rank of a training stage that also writes all tensors of its module as they are in memory, before and after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from pretrain.distributed.engine import import_deepspeed
from pretrain.train import main as training
from pretrain.train.trainer import Trainer


def write(module: nn.Module, path: Path, rank: int) -> None:
    """Write the whole tensors of a module, of which ZeRO-3 keeps a part per rank; collective, rank 0 writes."""
    with import_deepspeed().zero.GatheredParameters(list(module.parameters())):
        whole = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    if rank == 0:
        torch.save(whole, path)


def main(job: tuple[str, str, list[str], str, int]) -> int:
    """Train (recipe, stage, overrides); write FOLDER/before.pt and FOLDER/after.pt; 0 if its exit code is as expected."""
    recipe, stage, overrides, folder, expected = job
    run = Trainer.run

    def recorded(trainer: Trainer, first: int) -> Any:
        write(trainer.engine.module, Path(folder, "before.pt"), trainer.runtime.rank)
        finished = run(trainer, first)
        write(trainer.engine.module, Path(folder, "after.pt"), trainer.runtime.rank)
        return finished

    with mock.patch.object(Trainer, "run", recorded):
        code = training.main(recipe, stage, overrides)
    print(f"exit code {code}, expected {expected}", flush=True)
    return int(code != expected)
