"""Method dispatch: turns a `TensorJob` into a function of a block.

Some methods (SLERP, TIES, ...) first make passes over the whole tensor to find factors or thresholds.

Every method accumulates in fp32 if all inputs have 16 bits, else in fp64. Factors are computed in fp64 and rounded
once to that type. Every product, difference and sum is rounded, in the order of the terms, without FMA.
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
from pretrain.merge.methods.native import FusedPass, SignElection
from pretrain.merge.methods.task_vectors import SparseTaskVector
from pretrain.weights.dtypes import Accumulator, accumulator, elements


@dataclass(frozen=True)
class Compute:
    """The method of one tensor, ready to run on blocks.

    total: returns the block's elements of the result in the accumulation type, before rounding to the stored type.
    fused: computes the stored elements in one compiled pass, with the same bits; None if there is no compiled pass.
    """

    total: Callable[[Block], np.ndarray]
    fused: FusedPass | None


def prepare(job: TensorJob, workers: Workers) -> Compute:
    """The `Compute` of a job. Results depend neither on block size nor on the number of threads."""
    kind = accumulator([workers.sources[term.source].info(term.name)[0] for term in job.reads])
    with np.errstate(all="ignore"):  # infinities and NaN in weights are data, not errors
        return METHODS[job.method](job, kind, workers)


def _linear(job: TensorJob, kind: Accumulator, workers: Workers) -> Compute:
    """sum_i w_i x_i."""
    factors = [kind(term.weight) for term in job.terms]
    return _weighted_sum(job, factors, kind)


def _slerp(job: TensorJob, kind: Accumulator, workers: Workers) -> Compute:
    """s_0 x_0 + s_1 x_1 with the factors s of `gram.slerp_factors`."""
    t, count = float(job.option("t", 0.5)), elements(job.shape)
    factors = [kind(factor) for factor in gram.slerp_factors(job.terms[0], job.terms[1], t, count, workers)]
    return _weighted_sum(job, factors, kind)


def _task_arithmetic(job: TensorJob, kind: Accumulator, workers: Workers) -> Compute:
    """base + sum_i f_i d_i.

    d_i is the sparse task vector of x_i, and f_i is lambda times the rescaled weight, divided by the sum of the weights
    if `normalize` is set.
    """
    scale, divisor, vectors = (
        float(job.option("lambda", 1.0)),
        _divisor(job),
        _task_vectors(job, kind, workers),
    )
    factors = [kind(scale * _rescaled_weight(job, vector, kind, workers) / divisor) for vector in vectors]
    return _base_plus_sum(job, vectors, factors, kind)


def _gram_sum(job: TensorJob, kind: Accumulator, workers: Workers) -> Compute:
    """sum_i f_i x_i, or base + sum_i f_i (x_i - base), with the factors f of `gram.gram_factors`."""
    factors = [kind(factor) for factor in gram.gram_factors(job, workers)]
    if job.base is None:
        return _weighted_sum(job, factors, kind)
    return _base_plus_sum(job, [SparseTaskVector(term) for term in job.terms], factors, kind)


def _base_plus_sum(
    job: TensorJob, vectors: Sequence[SparseTaskVector], factors: Sequence[np.floating], kind: Accumulator
) -> Compute:
    """base + sum_i f_i d_i, where d_i are the sparse task vectors."""
    base = _base(job)

    def compute(block: Block) -> np.ndarray:
        total = block.array("total", kind)
        for number, (vector, factor) in enumerate(zip(vectors, factors, strict=True)):
            difference = total if number == 0 else block.array("difference", kind)
            _sparse_difference(vector, base, block, difference)
            np.multiply(difference, factor, out=difference)
            if number:
                np.add(total, difference, out=total)
        return np.add(block.wide(base, kind), total, out=total)

    return Compute(compute, native.task_vector_pass(vectors, factors, base, None, kind, job.dtype))


def _consensus(job: TensorJob, kind: Accumulator, workers: Workers) -> Compute:
    """base + lambda * elected sum of w_i d_i (`sparsify.elected_sum`), where d_i are the sparse task vectors."""
    base, vectors = _base(job), _task_vectors(job, kind, workers)
    factors = [kind(_rescaled_weight(job, vector, kind, workers)) for vector in vectors]
    normalize = bool(job.option("normalize", job.method == "ties"))
    weights = [kind(term.weight) for term in job.terms] if normalize else None
    scale = kind(float(job.option("lambda", 1.0)))

    def compute(block: Block) -> np.ndarray:
        weighted = []
        for number, (vector, factor) in enumerate(zip(vectors, factors, strict=True)):
            difference = block.array(f"difference {number}", kind)
            _sparse_difference(vector, base, block, difference)
            weighted.append(np.multiply(difference, factor, out=difference))
        total = sparsify.elected_sum(weighted, weights, block)
        np.multiply(total, scale, out=total)
        return np.add(block.wide(base, kind), total, out=total)

    election = SignElection(scale, weights)
    return Compute(compute, native.task_vector_pass(vectors, factors, base, election, kind, job.dtype))


METHODS: dict[str, Callable[[TensorJob, Accumulator, Workers], Compute]] = {
    "linear": _linear,
    "slerp": _slerp,
    "task_arithmetic": _task_arithmetic,
    "ties": _consensus,
    "dare_linear": _task_arithmetic,
    "dare_ties": _consensus,
    "breadcrumbs": _task_arithmetic,
    "breadcrumbs_ties": _consensus,
    **dict.fromkeys(("nuslerp", "multislerp", "karcher", "model_stock"), _gram_sum),
    "sce": lambda job, kind, workers: Compute(sce.prepare(job, kind, workers), None),
}


def _weighted_sum(job: TensorJob, factors: Sequence[np.floating], kind: Accumulator) -> Compute:
    """sum_i f_i x_i."""
    return Compute(
        lambda block: _sum_of_products(job.terms, factors, block),
        native.linear_pass(job.terms, factors, kind, job.dtype),
    )


def _sum_of_products(terms: Sequence[Term], factors: Sequence[np.floating], block: Block) -> np.ndarray:
    total = block.scaled(terms[0], factors[0], "total")
    for term, factor in zip(terms[1:], factors[1:], strict=True):
        np.add(total, block.scaled(term, factor, "product"), out=total)
    return total


def _sparse_difference(vector: SparseTaskVector, base: Term, block: Block, out: np.ndarray) -> None:
    """Write the block's elements of a sparse task vector to `out`."""
    block.difference(vector.term, base, out)
    if vector.dare is not None:
        sparsify.zero_unless(out, task_vectors.dare_mask(vector.dare, vector.term.density, block), block)
    if vector.kept is not None:
        sparsify.zero_unless(out, sparsify.selected(out, vector.kept, block), block)
    if vector.outliers is not None:
        outliers = sparsify.selected(out, vector.outliers, block)
        sparsify.zero_unless(out, np.logical_not(outliers, out=outliers), block)


def _task_vectors(job: TensorJob, kind: Accumulator, workers: Workers) -> list[SparseTaskVector]:
    """The sparse task vector of each term, as DARE, TIES or Breadcrumbs select it.

    Thresholds do not depend on the weights, so all plans of a sweep share one computation.
    """
    base, count, terms = _base(job), elements(job.shape), job.terms
    cache_key = tuple(replace(term, weight=0.0) for term in terms), base
    if job.method.startswith("dare"):
        return [SparseTaskVector(term, dare=_dare_key(job, term)) for term in terms]
    if job.method == "ties":
        sizes = [(term, max(1, int(term.density * count))) for term in terms]  # at least one, as in mergekit
        compute = partial(sparsify.trim_thresholds, sizes, base, kind, count, workers)
        thresholds = workers.cached(cache_key, compute)
        return [SparseTaskVector(term, kept=kept) for term, kept in zip(terms, thresholds, strict=True)]
    if job.method.startswith("breadcrumbs"):
        gamma = float(job.option("gamma", 0.01))
        compute_bands = partial(sparsify.breadcrumbs_thresholds, terms, base, gamma, kind, count, workers)
        bands = workers.cached((*cache_key, gamma), compute_bands)
        return [
            SparseTaskVector(term, kept=kept, outliers=outliers)
            for term, (kept, outliers) in zip(terms, bands, strict=True)
        ]
    return [SparseTaskVector(term) for term in terms]


def _dare_key(job: TensorJob, term: Term) -> bytes | None:
    """Key of the term's DARE mask; None if its density keeps every entry."""
    if term.density >= 1:
        return None
    return task_vectors.dare_key(int(job.option("seed", 0)), job.name, term.source)


def _rescaled_weight(job: TensorJob, vector: SparseTaskVector, kind: Accumulator, workers: Workers) -> float:
    """The weight of a term, rescaled as the option `rescale` says.

    True (the default of DARE): divided by the density, which keeps the expected value. "l1": multiplied so that the
    sparse task vector has the L1 norm of the full difference. False: unchanged.
    """
    rule, term = job.option("rescale", job.method.startswith("dare")), vector.term
    if not rule:
        return term.weight
    if rule != "l1":
        return term.weight / term.density
    if term.density >= 1:
        return term.weight
    base, count = _base(job), elements(job.shape)
    compute = partial(sparsify.l1_ratio, vector, base, _sparse_difference, kind, count, workers)
    return term.weight * workers.cached(("l1", replace(term, weight=0.0), base), compute)


def _base(job: TensorJob) -> Term:
    assert job.base is not None
    return job.base


def _divisor(job: TensorJob) -> float:
    """Sum of the weights if `normalize` is set and the sum is not about 0 (1e-8), else 1."""
    total = math.fsum(term.weight for term in job.terms) if job.option("normalize", False) else 1.0
    return total if abs(total) >= 1e-8 else 1.0
