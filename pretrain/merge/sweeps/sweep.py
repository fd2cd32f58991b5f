"""`sweep`, `interpolated`: many betas in one pass.

`sweep` writes the merges of two inputs at many betas and reads the inputs once. `interpolated` writes nothing: it
computes each tensor of one merge on access, for evaluation in the same process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.storage.files import join
from pretrain.merge.merge_plan import Plan
from pretrain.merge.output.writer import Progress, combine_range
from pretrain.merge.planning.inputs import OpenedInputs
from pretrain.merge.planning.planner import prepare
from pretrain.merge.planning.request import make_request, resolve_weights
from pretrain.merge.sweeps.scored_sweep import run_sweep
from pretrain.weights.dtypes import ELEMENTS_PER_BLOCK, elements
from pretrain.weights.source import WeightSource, open_weights

Address = TypeVar("Address", Path, str)


def sweep(
    a: str,
    b: str,
    betas: Sequence[float],
    out: Address,
    *,
    run_dir: Path | None = None,
    chunk: int = ELEMENTS_PER_BLOCK,
    threads: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[float, Address]:
    """Write theta = beta * A + (1 - beta) * B for every beta to `out/beta-0.30/` and so on, each as `merge` writes it.

    out:     a folder on a disk or in a store.
    options: those of `merge`: only, copy_rest, dtype, ...

    Every chunk of A and B is read once for all betas. Outputs that are complete are not written again.
    Returns beta -> folder, as Path or URL like `out`; `out/sweep.json` lists the same.
    """
    plans, opened = plan_sweep(a, b, betas, run_dir=run_dir, **options)
    result = run_sweep(plans, opened, betas, out, chunk=chunk, threads=threads, progress=progress)
    folders = {point.beta: point.folder for point in result.points}
    return {beta: type(out)(join(str(out), folders[beta] or "")) for beta in betas}


def plan_sweep(
    a: str, b: str, betas: Sequence[float], *, run_dir: Path | None = None, **options: Any
) -> tuple[list[Plan], OpenedInputs]:
    """One plan per beta, all with the same tensors at the same offsets. Raises UserError for an empty list of betas."""
    if not betas:
        raise UserError("a sweep needs at least one beta")
    weights = [resolve_weights(2, beta, None) for beta in betas]
    return prepare(make_request([a, b], beta=betas[0], **options), weights, run_dir)


class Interpolated(Mapping[str, np.ndarray]):
    """A merged state dict that computes each tensor on access; nothing is written.

    Values have the bits and shapes that `merge` stores; BF16 is returned as float32, which represents it exactly.
    Includes the frozen tensors of the stage.
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
    """beta * A + (1 - beta) * B as a lazy mapping name -> array; options: those of `sweep` (only, ...)."""
    plans, opened = plan_sweep(a, b, [beta], **options)
    return Interpolated(plans[0], opened.sources)
