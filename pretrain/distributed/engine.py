"""The only file that imports deepspeed: process group, `Runtime`, `Engine`.

One optimizer step may sum several losses and is exact on every ZeRO stage. This file works around these problems of
DeepSpeed:
- Under ZeRO-3, a parameter whose first gradient of a step comes in a later backward accumulates onto the gradient of
  the previous step. `coalesce_grad_reduction` avoids it.
- Under ZeRO-2, several backwards reduce in an order that must match over ranks. `coalesce_grad_reduction` avoids it.
  (It does not exist at stage 0, where gradients accumulate until `step`.)
- ZeRO averages gradients over ranks. The loss of a rank is its part of a sum over ranks, so it is multiplied by the
  world size.
- `deepspeed.init_distributed` compiles the op shm_comm with g++ and maps /dev/shm. It is switched off.
- `deepspeed.initialize` imports its Muon, which imports torch's inductor. `_import_muon` imports Muon
  without inductor.
- The default of gradient_clipping is 1.0 since 0.19. It is always set explicitly.
- `load_checkpoint` without a tag reads `latest`, which may name an incomplete checkpoint. A tag is always passed.

tests/dist/test_deepspeed_quirks.py reproduces the first problem, and the one with 0-dim parameters that models/clip.py
avoids. tests/dist/test_reference.py checks losses, gradients and weights on all ZeRO stages.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# A clipping threshold that never clips. With 0, DeepSpeed does not compute the gradient norm either.
UNCLIPPED = 1e30


class NonFiniteNorm(RuntimeError):
    """Raised before the update of ZeRO stage 0; the optimizers of stages 1 to 3 skip such a step themselves."""


@dataclass(frozen=True)
class Runtime:
    """Rank, world size and device of this process."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def import_deepspeed() -> Any:
    """Import deepspeed without its log output and without the op that needs a compiler."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.ops
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    _import_muon()
    return deepspeed


def _import_muon() -> None:
    """Import DeepSpeed's Muon, as `deepspeed.initialize` would, but without torch.compile on its functions.

    torch.compile as a decorator imports torch's inductor: 2.5 s of processor time per start, for an optimizer that is
    not used here.
    """
    with contextlib.suppress(ImportError, AttributeError):  # other versions of DeepSpeed
        from deepspeed.runtime import compiler

        compile_function = compiler.compile
        compiler.compile = lambda: lambda function: function
        try:
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
        finally:
            compiler.compile = compile_function


def join_process_group(timeout_minutes: float = 30) -> Runtime:
    """Join the process group described by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Without these variables it is a group of one process. `timeout_minutes` is the limit of a collective.
    """
    deepspeed = import_deepspeed()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.setdefault("LOCAL_RANK", "0"))
    for key, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        (
            "MASTER_PORT",
            "0" if world == 1 else "29500",
        ),  # 0: any free port, so that two runs do not share one
    ):
        os.environ.setdefault(key, value)
    cuda = torch.cuda.is_available()
    deepspeed.init_distributed(
        dist_backend="nccl" if cuda else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=datetime.timedelta(minutes=timeout_minutes),
        rank=rank,
        world_size=world,
    )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    return Runtime(rank, world, local, device)


def leave_process_group() -> None:
    """Leave the process group; safe to call twice."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with their own learning rate and weight decay; `names` as in `named_parameters`."""

    names: frozenset[str]
    weight_decay: float


def decay_groups(
    model: nn.Module, weight_decay: float, groups: Sequence[ParameterGroup] = ()
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: matrices decay; vectors, scalars, norms, biases and single learned tokens do not.

    A matrix has at least two sides longer than 1. `rate` of a group is 0 for the parameters outside `groups`, else
    1 + the index of the first of `groups` that names them.
    """
    found: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = next((1 + index for index, group in enumerate(groups) if name in group.names), 0)
            is_matrix = len([side for side in parameter.shape if side > 1]) >= 2
            found.setdefault((rate, is_matrix), []).append(parameter)
    decays = [weight_decay, *(group.weight_decay for group in groups)]
    return [
        {"params": parameters, "weight_decay": decays[rate] if is_matrix else 0.0, "rate": rate}
        for (rate, is_matrix), parameters in sorted(
            found.items(), key=lambda item: (item[0][0], not item[0][1])
        )
    ]


class Engine:
    """A model under DeepSpeed: call it for the forward, call `backward` inside `accumulate`, then `step`."""

    def __init__(
        self,
        model: nn.Module,
        zero: int,
        dtype: str,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        clip: float,
        runtime: Runtime,
        groups: Sequence[ParameterGroup] = (),
    ) -> None:
        deepspeed = import_deepspeed()
        self.zero, self.clip, self.world_size = zero, clip, runtime.world_size
        self.device = runtime.device
        self._norm: Tensor | float = 0.0
        model.to(runtime.device)
        parameters = decay_groups(model, weight_decay, groups)
        # Not in the optimizer's groups: a load replaces them by those of the file.
        self._rates = [group.pop("rate") for group in parameters]
        self._settings = [
            {"betas": betas, "eps": eps, "weight_decay": group["weight_decay"]} for group in parameters
        ]
        optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=betas, eps=eps)
        if zero == 0:
            optimizer.register_step_pre_hook(self._clip_stage_0)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": zero != 0,
            "gradient_clipping": 0.0 if zero == 0 else (clip or UNCLIPPED),
            "bf16": {"enabled": dtype == "bf16"},
            "zero_optimization": {"stage": zero, "overlap_comm": False, "contiguous_gradients": True},
            "steps_per_print": 1 << 31,
            "wall_clock_breakdown": False,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.module: nn.Module = self._engine.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, through DeepSpeed's hooks."""
        return self._engine(*args, **kwargs)

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Context of the backward passes of one optimizer step. Gradients are reduced once, at its end."""
        if self.zero == 0:
            yield
            return
        with self._engine.coalesce_grad_reduction():
            yield

    def backward(self, loss: Tensor) -> None:
        """Backward pass of `loss`, this rank's part of a sum over all ranks.

        DeepSpeed averages over ranks, so the loss is multiplied by the world size.
        """
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, *rates: float) -> float | None:
        """Clip, update, and return the global gradient norm before clipping.

        `rates`: the learning rate outside the groups, then that of each group. If the norm is not finite, returns None
        and no rank updates.
        """
        for group, index in zip(self._engine.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rates[index]
        try:
            self._engine.step()
        except NonFiniteNorm:
            return None
        norm = float((self._norm if self.zero == 0 else self._engine.get_global_grad_norm()) or 0.0)
        return norm if math.isfinite(norm) and self._engine.was_step_applied() else None

    def _clip_stage_0(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip or UNCLIPPED, foreach=True)
        if not torch.isfinite(self._norm):
            raise NonFiniteNorm

    def save(self, folder: Path, tag: str) -> None:
        """Write a checkpoint in DeepSpeed's layout into `folder/tag`, without frozen parameters. Collective."""
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path, tag: str) -> None:
        """Load weights and optimizer state from `folder/tag`, which holds no frozen parameters. Collective."""
        path, _ = self._engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
        if path is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint {tag} in {folder}")
        # DeepSpeed restores the settings of the file; those of the recipe apply.
        for group, settings in zip(self._engine.optimizer.param_groups, self._settings, strict=True):
            group.update(settings)
