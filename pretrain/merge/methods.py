"""What a merge computes for a tensor: a first look at the whole of it, where one is needed, then a function of a block.

Every method accumulates in fp32 where all inputs have 16 bits, else in fp64. Its factors are computed in fp64 and
rounded once to that type; every product, difference and sum is rounded, in the order of the terms, without FMA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from pretrain.merge import breadcrumbs, dare, fused, gram, rescale, slerp, ties
from pretrain.merge.blocks import Block, Workers
from pretrain.merge.breadcrumbs import Band
from pretrain.merge.fused import Election, Part, Pass
from pretrain.merge.kernels import FLOATS, Kind, accumulator, narrow
from pretrain.merge.plan import TensorJob, Term
from pretrain.merge.safetensors_io import elements

Cuts = Mapping[Term, ties.Cut | Band | None]


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
    scale, divisor, cuts = float(job.option("lambda", 1.0)), _divisor(job), _cuts(job, kind, workers)
    factors = [kind(scale * _rescaled(job, term, kind, cuts, workers) / divisor) for term in job.terms]
    return _added(job, factors, cuts, kind)


def _spanned(job: TensorJob, kind: Kind, workers: Workers) -> Compute:
    """The sum of the inputs, or of their differences to the base, with the factors of pretrain.merge.gram"""
    factors = [kind(factor) for factor in gram.factors(job, workers)]
    return _weighted(job, factors, kind) if job.base is None else _added(job, factors, {}, kind)


def _added(job: TensorJob, factors: Sequence[np.floating], cuts: Cuts, kind: Kind) -> Compute:
    """base + sum_i f_i d_i, d_i what is left of x_i - base"""
    base = job.base
    assert base is not None

    def compute(block: Block) -> np.ndarray:
        total = block.array("total", kind)
        for number, (term, factor) in enumerate(zip(job.terms, factors, strict=True)):
            use = total if number == 0 else block.array("difference", kind)
            _left(job, term, base, cuts, block, use)
            np.multiply(use, factor, out=use)
            if number:
                np.add(total, use, out=total)
        return np.add(block.wide(base, kind), total, out=total)

    parts = [
        Part(term, factor, kind(0), None, _key(job, term))
        for term, factor in zip(job.terms, factors, strict=True)
    ]
    whole = not any(isinstance(cut, Band) for cut in cuts.values())
    return Compute(compute, fused.based(parts, base, None, kind, job.dtype) if whole else None)


def _consensus(job: TensorJob, kind: Kind, workers: Workers) -> Compute:
    """base + lambda elect_i(w_i d_i), d_i what trimming (ties) or choice (dare_ties) leaves of x_i - base"""
    base, cuts = job.base, _cuts(job, kind, workers)
    assert base is not None
    factors = [kind(_rescaled(job, term, kind, cuts, workers)) for term in job.terms]
    divided = bool(job.option("normalize", job.method == "ties"))
    weights = [kind(term.weight) for term in job.terms]
    scale = kind(float(job.option("lambda", 1.0)))

    def compute(block: Block) -> np.ndarray:
        weighted = []
        for number, (term, factor) in enumerate(zip(job.terms, factors, strict=True)):
            one = block.array(f"difference {number}", kind)
            _left(job, term, base, cuts, block, one)
            weighted.append(np.multiply(one, factor, out=one))
        total = ties.elect(weighted, weights if divided else None, block)
        np.multiply(total, scale, out=total)
        return np.add(block.wide(base, kind), total, out=total)

    parts = []
    for term, factor, weight in zip(job.terms, factors, weights, strict=True):
        cut = cuts.get(term)
        if isinstance(cut, Band):
            return Compute(compute, None)
        place = (cut.key, cut.end) if cut is not None else None
        parts.append(Part(term, factor, weight, place, _key(job, term)))
    return Compute(compute, fused.based(parts, base, Election(scale, divided), kind, job.dtype))


METHODS: dict[str, Callable[[TensorJob, Kind, Workers], Compute]] = {
    "linear": _linear,
    "slerp": _slerp,
    "task_arithmetic": _task_arithmetic,
    "ties": _consensus,
    "dare_linear": _task_arithmetic,
    "dare_ties": _consensus,
    "breadcrumbs": _task_arithmetic,
    "breadcrumbs_ties": _consensus,
    **dict.fromkeys(("nuslerp", "multislerp", "karcher", "model_stock"), _spanned),
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


def _left(job: TensorJob, term: Term, base: Term, cuts: Cuts, block: Block, out: np.ndarray) -> None:
    """What choice or trimming leaves of x - base."""
    _difference(job, term, base, block, out)
    cut = cuts.get(term)
    if isinstance(cut, Band):
        breadcrumbs.trim(out, cut, block)
    else:
        ties.trim(out, cut, block)


def _cuts(job: TensorJob, kind: Kind, workers: Workers) -> Cuts:
    """Where TIES and Breadcrumbs cut each difference; one look serves all plans of a sweep."""
    base, count = job.base, elements(job.shape)
    assert base is not None
    found: dict[Term, ties.Cut | Band | None] = {}
    for term in job.terms:
        key = replace(term, weight=0.0), base
        if job.method == "ties":
            found[term] = workers.once(key, partial(ties.cut, term, base, kind, count, workers))
        elif job.method.startswith("breadcrumbs"):
            gamma = float(job.option("gamma", 0.01))
            find = partial(breadcrumbs.band, term, base, gamma, kind, count, workers)
            found[term] = workers.once((*key, gamma), find)
    return found


def _rescaled(job: TensorJob, term: Term, kind: Kind, cuts: Cuts, workers: Workers) -> float:
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
        _left(job, term, base, cuts, block, out)

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
