"""AdamW for ZeRO stage 0, where DeepSpeed neither clips nor checks the gradient: both happen in `step`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that clips the global gradient norm, and changes nothing if that norm is not finite.

    limit:    upper limit of the norm
    norm:     the norm before clipping in the last step
    overflow: the last step was skipped; DeepSpeed's engine reads this name after every step
    """

    def __init__(self, groups: list[dict[str, Any]], limit: float, **options: Any) -> None:
        super().__init__(groups, **options)
        self.limit = limit
        self.norm: Tensor = torch.zeros(())
        self.overflow = False

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.norm = torch.nn.utils.clip_grad_norm_(parameters, self.limit, foreach=True)
        self.overflow = not bool(torch.isfinite(self.norm))
        if not self.overflow:
            super().step(closure)
