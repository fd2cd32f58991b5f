"""Many betas of two inputs: written in one pass over them, or computed tensor by tensor for whoever evaluates."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.storage import publish
from pretrain.merge.kernels import BLOCK
from pretrain.merge.plan import Plan
from pretrain.merge.prepare import Opened, prepare
from pretrain.merge.request import request
from pretrain.merge.safetensors_io import elements
from pretrain.merge.shares import resolve_weights
from pretrain.merge.sources import WeightSource, open_weights
from pretrain.merge.tool import execute
from pretrain.merge.writer import Progress, combine_range


def parse_betas(text: str) -> list[float]:
    """`0:1:0.1` -> 0, 0.1, ... 1, both ends included; `0,0.25,1` -> as listed. Exact decimals, ascending."""
    try:
        if ":" not in text:
            betas = {Decimal(part) for part in text.split(",")}
        else:
            first, last, step = (Decimal(part) for part in text.split(":"))
            if not step.is_finite() or step <= 0 or not last >= first:
                raise UserError(
                    f"--betas {text}: START:STOP:STEP with a step above 0 and STOP not below START"
                )
            if (last - first) / step > 10_000:
                raise UserError(f"--betas {text}: more than 10000 betas; take a larger step")
            betas = {last} | {first + step * i for i in range(int((last - first) / step) + 1)}
    except (InvalidOperation, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"--betas {text}: write START:STOP:STEP, such as 0:1:0.1, or a list, 0,0.5,1"
        ) from None
    wrong = [beta for beta in betas if not 0 <= beta <= 1]
    if wrong:
        raise UserError(f"--betas {text}: {wrong[0]} is not between 0 and 1")
    return [float(beta) for beta in sorted(betas)]


def folder_names(betas: Sequence[float]) -> list[str]:
    """`beta-0.30`: two decimals, more where a beta needs them to be told apart."""
    places = max(2, *(-int(Decimal(repr(beta)).normalize().as_tuple().exponent) for beta in betas))
    return [f"beta-{beta:.{places}f}" for beta in betas]


def sweep(
    a: str,
    b: str,
    betas: Sequence[float],
    out: Path | str,
    *,
    only: str | None = None,
    copy_rest: str | None = None,
    dtype: str | None = None,
    run_dir: Path | None = None,
    chunk: int = BLOCK,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[float, Path]:
    """theta = beta * A + (1 - beta) * B for every beta, in `out/beta-0.30/` and so on, each as `merge` writes it.

    Every chunk of A and B is read once for all betas. Outputs that are complete are not done again.
    Returns beta -> folder, and writes it as `out/sweep.json`.
    """
    if not betas:
        raise UserError("a sweep needs betas")
    plans, opened = plan_sweep(a, b, betas, only=only, copy_rest=copy_rest, dtype=dtype, run_dir=run_dir)
    return write_sweep(plans, opened, betas, Path(out), chunk, threads, progress)


def write_sweep(
    plans: Sequence[Plan],
    opened: Opened,
    betas: Sequence[float],
    out: Path,
    chunk: int = BLOCK,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[float, Path]:
    """Carry out the plans of `plan_sweep`, one a beta."""
    folders = [out / name for name in folder_names(betas)]
    execute(plans, opened, folders, chunk, threads, progress)
    listed = [{"beta": beta, "folder": path.name} for beta, path in zip(betas, folders, strict=True)]
    a, b = plans[0].addresses[:2]
    record = {"theta": "beta * A + (1 - beta) * B", "A": a, "B": b, "betas": listed}
    publish(out / "sweep.json", (json.dumps(record, indent=1) + "\n").encode())
    return dict(zip(betas, folders, strict=True))


def plan_sweep(
    a: str,
    b: str,
    betas: Sequence[float],
    *,
    only: str | None = None,
    copy_rest: str | None = None,
    dtype: str | None = None,
    run_dir: Path | None = None,
) -> tuple[list[Plan], Opened]:
    """One plan a beta, all with the same tensors in the same places."""
    weights = [resolve_weights(2, beta, None) for beta in betas]
    asked = request([a, b], beta=betas[0], only=only, copy_rest=copy_rest, dtype=dtype)
    return prepare(asked, weights, run_dir)


class Interpolated(Mapping[str, np.ndarray]):
    """A merged state dict that computes each tensor when it is asked for; nothing is written.

    Tensors are what `merge` would store: the same bits, in their shapes; BF16 as float32, which holds it exactly.
    Frozen tensors are among them.
    """

    def __init__(self, plan: Plan, sources: Sequence[WeightSource]) -> None:
        self.plan, self._sources = plan, sources
        self._jobs = {job.name: number for number, job in enumerate(plan.jobs)}
        self._frozen = open_weights(str(plan.frozen)) if plan.frozen is not None else None
        self._names = [*self._jobs, *(self._frozen.names() if self._frozen else ())]

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._jobs:
            if self._frozen is None:
                raise KeyError(name)
            return self._frozen.array(name)
        job = self.plan.jobs[self._jobs[name]]
        flat = combine_range(self.plan, self._sources, self._jobs[name], 0, elements(job.shape))
        if job.dtype == "BF16":
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.reshape(job.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def interpolated(a: str, b: str, beta: float, **options: Any) -> Interpolated:
    """beta * A + (1 - beta) * B as a lazy mapping name -> array; options as of `sweep` (only, copy_rest, ...)."""
    plans, opened = plan_sweep(a, b, [beta], **options)
    return Interpolated(plans[0], opened.sources)
