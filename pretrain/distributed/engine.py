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
- In bf16, stage 0 begins with an optimizer step of zero gradients, to allocate the state; the bias correction of the
  first real update is then that of step 2. The count starts at 0 again.
- `load_checkpoint` without a tag reads `latest`, which may name an incomplete checkpoint. A tag is always passed.
- `load_checkpoint` brings back the optimizer's options and the clipping threshold of the file. `load` sets those of the
  recipe again.

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

from pretrain.distributed.clipped_adamw import ClippedAdamW

# A clipping threshold that never clips. With 0, DeepSpeed does not compute the gradient norm either.
UNCLIPPED = 1e30


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
        model.to(runtime.device)
        parameters = decay_groups(model, weight_decay, groups)
        # Not in the optimizer's groups: a load replaces them by those of the file.
        self._rates = [group.pop("rate") for group in parameters]
        options: dict[str, Any] = {"lr": 0.0, "betas": betas, "eps": eps}
        self._options = [options | {"weight_decay": group["weight_decay"]} for group in parameters]
        self._clipped = ClippedAdamW(parameters, clip or UNCLIPPED, **options) if zero == 0 else None
        optimizer = self._clipped or torch.optim.AdamW(parameters, **options)
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
        if zero == 0:
            for state in optimizer.state.values():
                state["step"].zero_()

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

        `rates`: the learning rate outside the groups, then that of each group. If the norm is not finite, returns None:
        no rank updates, and the gradients are gone.
        """
        for group, index in zip(self._engine.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rates[index]
        # ZeRO-3 reuses these tensors: a parameter without a gradient in the next step would find the old one there.
        kept = self._reduced_gradients() if self.zero == 3 else []
        self._engine.step()
        measured = self._clipped.norm if self._clipped else self._engine.get_global_grad_norm()
        norm = float(measured or 0.0)
        for gradient in kept:
            gradient.zero_()
        return norm if math.isfinite(norm) and self._engine.was_step_applied() else None

    def discard(self) -> None:
        """Forget the gradients of `accumulate` without an update; weights and optimizer state keep their bits.

        Stages 1 to 3 add the next step's gradients to those that no step took, so DeepSpeed must take the step. It
        skips one whose gradients are not finite.
        """
        if self.zero == 0:
            self._engine.zero_grad()
            return
        gradients = self._reduced_gradients()
        for gradient in gradients:
            gradient.fill_(math.nan)
        self._engine.step()
        for gradient in gradients:
            gradient.zero_()

    def non_finite_gradients(self) -> set[str]:
        """Names of the parameters whose gradient on this rank is not finite; call it inside `accumulate`."""
        gradients = ((name, parameter.grad) for name, parameter in self.module.named_parameters())
        return {name for name, grad in gradients if grad is not None and not torch.isfinite(grad).all()}

    def _reduced_gradients(self) -> list[Tensor]:
        """This rank's part of the reduced gradients, under ZeRO stages 1 to 3."""
        parts = self._engine.optimizer.averaged_gradients.values()
        return [gradient for part in parts if part is not None for gradient in part]

    def save(self, folder: Path, tag: str) -> None:
        """Write a checkpoint in DeepSpeed's layout into `folder/tag`, without frozen parameters. Collective."""
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path, tag: str) -> None:
        """Load weights and optimizer state from `folder/tag`, which holds no frozen parameters. Collective.

        Learning rate, betas, eps, weight decay and clipping stay those of this engine.
        """
        path, _ = self._engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
        if path is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint {tag} in {folder}")
        # DeepSpeed restores the settings of the file; those of the recipe apply.
        for group, options in zip(self._engine.optimizer.param_groups, self._options, strict=True):
            group |= options
        if self.zero != 0:
            self._engine.optimizer.clip_grad = self.clip or UNCLIPPED
