"""Many betas of two inputs: written in one pass over them, or computed tensor by tensor for whoever evaluates."""

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
from pretrain.merge.planning.request import request, resolve_weights
from pretrain.merge.sweeps.scored_sweep import run_sweep
from pretrain.weights.dtypes import ELEMENTS_PER_BLOCK, elements
from pretrain.weights.source import WeightSource, open_weights

Place = TypeVar("Place", Path, str)


def sweep(
    a: str,
    b: str,
    betas: Sequence[float],
    out: Place,
    *,
    run_dir: Path | None = None,
    chunk: int = ELEMENTS_PER_BLOCK,
    threads: int | None = None,
    progress: Progress | None = None,
    **asked: Any,
) -> dict[float, Place]:
    """theta = beta * A + (1 - beta) * B for every beta, in `out/beta-0.30/` and so on, each as `merge` writes it.

    out: a folder on a disk or in a store.

    Every chunk of A and B is read once for all betas. Outputs that are complete are not done again.
    asked: as of `merge`: only, copy_rest, dtype, ...
    Returns beta -> folder, a path or a URL as `out` is, and writes it as `out/sweep.json`.
    """
    plans, opened = plan_sweep(a, b, betas, run_dir=run_dir, **asked)
    made = run_sweep(plans, opened, betas, out, chunk=chunk, threads=threads, progress=progress)
    folders = {one.beta: one.folder for one in made.betas}
    return {beta: type(out)(join(str(out), folders[beta] or "")) for beta in betas}


def plan_sweep(
    a: str, b: str, betas: Sequence[float], *, run_dir: Path | None = None, **asked: Any
) -> tuple[list[Plan], OpenedInputs]:
    """One plan a beta, all with the same tensors in the same places."""
    if not betas:
        raise UserError("a sweep needs betas")
    weights = [resolve_weights(2, beta, None) for beta in betas]
    return prepare(request([a, b], beta=betas[0], **asked), weights, run_dir)


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
