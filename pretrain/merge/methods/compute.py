"""What a merge computes for a tensor: a first look at the whole of it, where one is needed, then a function of a block.

Every method accumulates in fp32 where all inputs have 16 bits, else in fp64. Its factors are computed in fp64 and
rounded once to that type; every product, difference and sum is rounded, in the order of the terms, without FMA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from pretrain.merge.merge_plan import TensorJob, Term
from pretrain.merge.methods import gram, native, sce, sparsify, task_vectors
from pretrain.merge.methods.blocks import Block, Workers
from pretrain.merge.methods.native import Election, Pass
from pretrain.merge.methods.task_vectors import SparseTaskVector
from pretrain.weights.dtypes import Accumulator, accumulator, elements


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
    with np.errstate(all="ignore"):  # infinities and NaN are data here
        return METHODS[job.method](job, kind, workers)


def _linear(job: TensorJob, kind: Accumulator, workers: Workers) -> Compute:
    """sum_i w_i x_i"""
    factors = [kind(term.weight) for term in job.terms]
    return _weighted(job, factors, kind)


def _slerp(job: TensorJob, kind: Accumulator, workers: Workers) -> Compute:
    """s_0 x_0 + s_1 x_1 with the factors of pretrain.merge.methods.slerp"""
    t, count = float(job.option("t", 0.5)), elements(job.shape)
    factors = [kind(factor) for factor in gram.slerp_factors(job.terms[0], job.terms[1], t, count, workers)]
    return _weighted(job, factors, kind)


def _task_arithmetic(job: TensorJob, kind: Accumulator, workers: Workers) -> Compute:
    """base + sum_i f_i d_i, d_i what choice or trimming leaves of x_i - base, f_i = lambda w_i, divided by the sum of
    the weights where normalised, and as much larger as rescaling says"""
    scale, divisor, parts = float(job.option("lambda", 1.0)), _divisor(job), _parts(job, kind, workers)
    factors = [kind(scale * _rescaled(job, part, kind, workers) / divisor) for part in parts]
    return _added(job, parts, factors, kind)


def _spanned(job: TensorJob, kind: Accumulator, workers: Workers) -> Compute:
    """The sum of the inputs, or of their differences to the base, with the factors of pretrain.merge.methods.gram"""
    factors = [kind(factor) for factor in gram.gram_factors(job, workers)]
    if job.base is None:
        return _weighted(job, factors, kind)
    return _added(job, [SparseTaskVector(term) for term in job.terms], factors, kind)


def _added(
    job: TensorJob, parts: Sequence[SparseTaskVector], factors: Sequence[np.floating], kind: Accumulator
) -> Compute:
    """base + sum of factor * part"""
    base = _base(job)

    def compute(block: Block) -> np.ndarray:
        total = block.array("total", kind)
        for number, (part, factor) in enumerate(zip(parts, factors, strict=True)):
            use = total if number == 0 else block.array("difference", kind)
            _fill(part, base, block, use)
            np.multiply(use, factor, out=use)
            if number:
                np.add(total, use, out=total)
        return np.add(block.wide(base, kind), total, out=total)

    return Compute(compute, native.based(parts, factors, base, None, kind, job.dtype))


def _consensus(job: TensorJob, kind: Accumulator, workers: Workers) -> Compute:
    """base + lambda elect_i(w_i d_i), d_i what choice or trimming leaves of x_i - base"""
    base, parts = _base(job), _parts(job, kind, workers)
    factors = [kind(_rescaled(job, part, kind, workers)) for part in parts]
    divided = bool(job.option("normalize", job.method == "ties"))
    weights = [kind(term.weight) for term in job.terms] if divided else None
    scale = kind(float(job.option("lambda", 1.0)))

    def compute(block: Block) -> np.ndarray:
        weighted = []
        for number, (part, factor) in enumerate(zip(parts, factors, strict=True)):
            one = block.array(f"difference {number}", kind)
            _fill(part, base, block, one)
            weighted.append(np.multiply(one, factor, out=one))
        total = sparsify.elect(weighted, weights, block)
        np.multiply(total, scale, out=total)
        return np.add(block.wide(base, kind), total, out=total)

    election = Election(scale, weights)
    return Compute(compute, native.based(parts, factors, base, election, kind, job.dtype))


METHODS: dict[str, Callable[[TensorJob, Accumulator, Workers], Compute]] = {
    "linear": _linear,
    "slerp": _slerp,
    "task_arithmetic": _task_arithmetic,
    "ties": _consensus,
    "dare_linear": _task_arithmetic,
    "dare_ties": _consensus,
    "breadcrumbs": _task_arithmetic,
    "breadcrumbs_ties": _consensus,
    **dict.fromkeys(("nuslerp", "multislerp", "karcher", "model_stock"), _spanned),
    "sce": lambda job, kind, workers: Compute(sce.prepare(job, kind, workers), None),
}


def _weighted(job: TensorJob, factors: Sequence[np.floating], kind: Accumulator) -> Compute:
    """sum_i f_i x_i"""
    return Compute(
        lambda block: _sum(job.terms, factors, block), native.linear(job.terms, factors, kind, job.dtype)
    )


def _sum(terms: Sequence[Term], factors: Sequence[np.floating], block: Block) -> np.ndarray:
    total = block.scaled(terms[0], factors[0], "total")
    for term, factor in zip(terms[1:], factors[1:], strict=True):
        np.add(total, block.scaled(term, factor, "product"), out=total)
    return total


def _fill(part: SparseTaskVector, base: Term, block: Block, out: np.ndarray) -> None:
    """What is left of x - base."""
    block.difference(part.term, base, out)
    if part.key is not None:
        sparsify.keep(out, task_vectors.dare_mask(part.key, part.term.density, block), block)
    if part.cut is not None:
        sparsify.keep(out, sparsify.within(out, part.cut, block), block)
    if part.top is not None:
        found = sparsify.within(out, part.top, block)
        sparsify.keep(out, np.logical_not(found, out=found), block)


def _parts(job: TensorJob, kind: Accumulator, workers: Workers) -> list[SparseTaskVector]:
    """What DARE chooses, TIES and Breadcrumbs cut of each difference; one look serves all plans of a sweep."""
    base, count, terms = _base(job), elements(job.shape), job.terms
    look = tuple(replace(term, weight=0.0) for term in terms), base
    if job.method.startswith("dare"):
        return [SparseTaskVector(term, key=_key(job, term)) for term in terms]
    if job.method == "ties":
        asked = [(term, max(1, int(term.density * count))) for term in terms]  # at least one, as in mergekit
        cuts = workers.once(look, partial(sparsify.cuts, asked, base, kind, count, workers))
        return [SparseTaskVector(term, cut=cut) for term, cut in zip(terms, cuts, strict=True)]
    if job.method.startswith("breadcrumbs"):
        gamma = float(job.option("gamma", 0.01))
        find = partial(sparsify.bands, terms, base, gamma, kind, count, workers)
        bands = workers.once((*look, gamma), find)
        return [
            SparseTaskVector(term, cut=cut, top=top) for term, (cut, top) in zip(terms, bands, strict=True)
        ]
    return [SparseTaskVector(term) for term in terms]


def _key(job: TensorJob, term: Term) -> bytes | None:
    """Of what DARE drops of a term; None where it drops nothing."""
    if term.density >= 1:
        return None
    return task_vectors.dare_key(int(job.option("seed", 0)), job.name, term.source)


def _rescaled(job: TensorJob, part: SparseTaskVector, kind: Accumulator, workers: Workers) -> float:
    """The weight; for DARE divided by the density, which keeps the mean, unless that is switched off; for `l1` so much
    larger that what is left of the difference has its norm (pretrain.merge.methods.rescale)."""
    rule, term = job.option("rescale", job.method.startswith("dare")), part.term
    if not rule:
        return term.weight
    if rule != "l1":
        return term.weight / term.density
    if term.density >= 1:
        return term.weight
    base, count = _base(job), elements(job.shape)
    find = partial(sparsify.l1, part, base, _fill, kind, count, workers)
    return term.weight * workers.once(("l1", replace(term, weight=0.0), base), find)


def _base(job: TensorJob) -> Term:
    assert job.base is not None
    return job.base


def _divisor(job: TensorJob) -> float:
    total = math.fsum(term.weight for term in job.terms) if job.option("normalize", False) else 1.0
    return total if abs(total) >= 1e-8 else 1.0
