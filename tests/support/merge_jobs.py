"""Runs merge methods on arrays: an in-memory source, a job, and its stored result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from pretrain.merge.merge_plan import TensorJob, Term
from pretrain.merge.methods.blocks import Workers
from pretrain.merge.methods.compute import prepare
from pretrain.merge.output.writer import rounded
from pretrain.weights.dtypes import DTYPES, TensorInfo
from pretrain.weights.source import WeightSource


class Held:
    """A source with one flat tensor, `w`, in its storage type."""

    def __init__(self, array: np.ndarray, dtype: str) -> None:
        self.array, self.dtype = array, dtype

    def info(self, name: str) -> TensorInfo:
        return self.dtype, self.array.shape

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.array[start:stop]


def run(
    method: str,
    arrays: Sequence[np.ndarray],
    dtypes: Sequence[str],
    weights: Sequence[float],
    out: str,
    *,
    densities: Sequence[float] | None = None,
    base: tuple[np.ndarray, str] | None = None,
    block: int = 1 << 16,
    threads: int = 2,
    name: str = "w",
    **options: Any,
) -> np.ndarray:
    """The stored result of `method`, computed in blocks of `block` elements; `lambda` is called `scale`."""
    sources = [Held(array, dtype) for array, dtype in zip(arrays, dtypes, strict=True)]
    densities = densities or [1.0] * len(arrays)
    terms = tuple(Term(i, "w", w, d) for i, (w, d) in enumerate(zip(weights, densities, strict=True)))
    if base is not None:
        sources.append(Held(*base))
    if "scale" in options:
        options["lambda"] = options.pop("scale")
    job = TensorJob(
        name, out, arrays[0].shape, cast(Any, method), terms, Term(len(arrays), "w") if base else None,
        tuple(sorted(options.items())), "mixed", 0, 0,
    )  # fmt: skip
    count = len(arrays[0])
    found = np.empty(count, DTYPES[out])
    with Workers(cast("list[WeightSource]", sources), 1, threads, block) as workers:
        compute = prepare(job, workers)
        with np.errstate(all="ignore"):
            for at in workers.blocks(0, count):
                found[at.start : at.stop] = rounded(at, job, compute)
    return found


def linear(
    arrays: Sequence[np.ndarray], dtypes: Sequence[str], weights: Sequence[float], out: str
) -> np.ndarray:
    return run("linear", arrays, dtypes, weights, out)
