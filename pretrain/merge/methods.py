"""What a merge computes for a tensor: a first look at the whole of it, where one is needed, then a function of a block.

Every method accumulates in fp32 where all inputs have 16 bits, else in fp64. Its factors are computed in fp64 and
rounded once to that type; every product, difference and sum is rounded, in the order of the terms, without FMA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pretrain.merge import dare, fused, rescale, slerp, ties
from pretrain.merge.blocks import Block, Workers
from pretrain.merge.fused import Election, Part, Pass
from pretrain.merge.kernels import FLOATS, Kind, accumulator, narrow
from pretrain.merge.plan import TensorJob, Term
from pretrain.merge.safetensors_io import elements


@dataclass(frozen=True)
class Compute:
    """A method for one tensor.

    total: a block's elements of the result in the accumulation type, before they are rounded to the stored one.
    fused: the stored elements in one compiled pass, with the same bits; None where nothing was compiled.
    """

    total: Callable[[Block], np.ndarray]
    fused: Pass | None


def prepare(job: TensorJob, workers: Workers) -> Compute:
    """How the blocks of `job` are computed; the same whatever the blocks and the number of threads."""
    kind = accumulator([workers.sources[term.source].info(term.name)[0] for term in job.reads])
    return METHODS[job.method](job, kind, workers)


def _linear(job: TensorJob, kind: Kind, workers: Workers) -> Compute:
    """sum_i w_i x_i"""
    factors = [kind(term.weight) for term in job.terms]
    return _weighted(job, factors, kind)


def _slerp(job: TensorJob, kind: Kind, workers: Workers) -> Compute:
    """s_0 x_0 + s_1 x_1 with the factors of pretrain.merge.slerp"""
    t, count = float(job.option("t", 0.5)), elements(job.shape)
    factors = [kind(factor) for factor in slerp.factors(job.terms[0], job.terms[1], t, count, workers)]
    return _weighted(job, factors, kind)


def _task_arithmetic(job: TensorJob, kind: Kind, workers: Workers) -> Compute:
    """base + sum_i f_i (x_i - base), f_i = lambda w_i, divided by the sum of the weights where normalised;
    with DARE only of what was chosen, and f_i divided by the density where rescaled"""
    base, divisor = job.base, _divisor(job)
    assert base is not None
    scale, cuts = float(job.option("lambda", 1.0)), dict.fromkeys(job.terms)
    factors = [kind(scale * _rescaled(job, term, kind, cuts, workers) / divisor) for term in job.terms]

    def compute(block: Block) -> np.ndarray:
        total = block.array("total", kind)
        for number, (term, factor) in enumerate(zip(job.terms, factors, strict=True)):
            use = total if number == 0 else block.array("difference", kind)
            _difference(job, term, base, block, use)
            np.multiply(use, factor, out=use)
            if number:
                np.add(total, use, out=total)
        return np.add(block.wide(base, kind), total, out=total)

    parts = [
        Part(term, factor, kind(0), None, _key(job, term))
        for term, factor in zip(job.terms, factors, strict=True)
    ]
    return Compute(compute, fused.based(parts, base, None, kind, job.dtype))


def _consensus(job: TensorJob, kind: Kind, workers: Workers) -> Compute:
    """base + lambda elect_i(w_i d_i), d_i what trimming (ties) or choice (dare_ties) leaves of x_i - base"""
    base, count = job.base, elements(job.shape)
    assert base is not None
    cuts = {term: _cut(term, base, kind, count, workers) for term in job.terms if job.method == "ties"}
    factors = [kind(_rescaled(job, term, kind, cuts, workers)) for term in job.terms]
    divided = bool(job.option("normalize", job.method == "ties"))
    weights = [kind(term.weight) for term in job.terms]
    scale = kind(float(job.option("lambda", 1.0)))

    def compute(block: Block) -> np.ndarray:
        weighted = []
        for number, (term, factor) in enumerate(zip(job.terms, factors, strict=True)):
            one = block.array(f"difference {number}", kind)
            _difference(job, term, base, block, one)
            ties.trim(one, cuts.get(term), block)
            weighted.append(np.multiply(one, factor, out=one))
        total = ties.elect(weighted, weights if divided else None, block)
        np.multiply(total, scale, out=total)
        return np.add(block.wide(base, kind), total, out=total)

    parts = [
        Part(term, factor, weight, (cut.key, cut.end) if (cut := cuts.get(term)) else None, _key(job, term))
        for term, factor, weight in zip(job.terms, factors, weights, strict=True)
    ]
    return Compute(compute, fused.based(parts, base, Election(scale, divided), kind, job.dtype))


METHODS: dict[str, Callable[[TensorJob, Kind, Workers], Compute]] = {
    "linear": _linear,
    "slerp": _slerp,
    "task_arithmetic": _task_arithmetic,
    "ties": _consensus,
    "dare_linear": _task_arithmetic,
    "dare_ties": _consensus,
}


def _weighted(job: TensorJob, factors: Sequence[np.floating], kind: Kind) -> Compute:
    """sum_i f_i x_i"""
    return Compute(
        lambda block: _sum(job.terms, factors, block), fused.linear(job.terms, factors, kind, job.dtype)
    )


def _sum(terms: Sequence[Term], factors: Sequence[np.floating], block: Block) -> np.ndarray:
    total = block.scaled(terms[0], factors[0], "total")
    for term, factor in zip(terms[1:], factors[1:], strict=True):
        np.add(total, block.scaled(term, factor, "product"), out=total)
    return total


def _difference(job: TensorJob, term: Term, base: Term, block: Block, out: np.ndarray) -> None:
    """x - base; for DARE only of the entries that were chosen."""
    block.difference(term, base, out)
    if (key := _key(job, term)) is not None:
        ties.keep(out, dare.chosen(key, term.density, block), block)


def _key(job: TensorJob, term: Term) -> bytes | None:
    """Of what DARE drops of a term; None where it drops nothing."""
    if not job.method.startswith("dare") or term.density >= 1:
        return None
    return dare.key_of(int(job.option("seed", 0)), job.name, term.source)


def _cut(term: Term, base: Term, kind: Kind, count: int, workers: Workers) -> ties.Cut | None:
    key = replace(term, weight=0.0), base
    return workers.once(key, lambda: ties.cut(term, base, kind, count, workers))


def _rescaled(
    job: TensorJob, term: Term, kind: Kind, cuts: Mapping[Term, ties.Cut | None], workers: Workers
) -> float:
    """The weight; for DARE divided by the density, which keeps the mean, unless that is switched off; for `l1` so much
    larger that what is left of the difference has its norm (pretrain.merge.rescale)."""
    rule, base = job.option("rescale", job.method.startswith("dare")), job.base
    if not rule or base is None:
        return term.weight
    if rule != "l1":
        return term.weight / term.density
    if term.density >= 1:
        return term.weight

    def left(block: Block, out: np.ndarray) -> None:
        _difference(job, term, base, block, out)
        ties.trim(out, cuts.get(term), block)

    def whole(block: Block, out: np.ndarray) -> None:
        block.difference(term, base, out)

    key = "l1", replace(term, weight=0.0), base
    return term.weight * workers.once(
        key, lambda: rescale.l1(whole, left, kind, elements(job.shape), workers)
    )


def _divisor(job: TensorJob) -> float:
    total = math.fsum(term.weight for term in job.terms) if job.option("normalize", False) else 1.0
    return total if abs(total) >= 1e-8 else 1.0


__all__ = ["FLOATS", "METHODS", "Compute", "accumulator", "narrow", "prepare"]
