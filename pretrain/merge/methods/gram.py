"""Methods whose result is a sum of the inputs with factors that follow from their norms and angles alone: one look at
the tensors gives all products of two of them, and the factors are arithmetic on that small matrix.

As in mergekit 0.1.5: NuSLERP, Multi-SLERP, the Karcher mean (arXiv 2603.04972) and Model Stock (arXiv 2403.19522).
With a base the vectors are differences to it, and what is summed is added to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from data_pipeline.errors import UserError
from pretrain.merge.merge_plan import TensorJob, Term
from pretrain.merge.methods import native
from pretrain.merge.methods.blocks import Workers
from pretrain.weights.dtypes import ELEMENTS_PER_BLOCK, elements, exact_sum

FLAT, TINY = 1e-7, 1e-6
"""mergekit's bounds: a norm up to which a vector has no direction; a sum up to which there is no estimate"""


COLINEAR = 0.9995
SHORTEST = 1e-8
"""a norm up to which a tensor has no direction; both numbers are mergekit's, so that its files give its results"""


def gram_factors(job: TensorJob, workers: Workers) -> list[float]:
    """One factor for each term of the job."""
    if len(job.terms) == 1:  # the others weigh nothing, or there are none
        return [abs(job.terms[0].weight) if job.method == "multislerp" else 1.0]
    key = "gram", tuple((term.source, term.name) for term in job.reads)
    products = workers.once(key, lambda: gram(job, workers))
    weights = np.array([term.weight for term in job.terms])
    found: Sequence[float] | np.ndarray
    if job.method == "nuslerp":
        found = nuslerp(products, float(job.option("t", 0.5)))
    elif job.method == "multislerp":
        found = multislerp(products, weights, float(job.option("eps", 1e-8)), job.name)
    elif job.method == "karcher":
        found = karcher(products, int(job.option("max_iter", 10)), float(job.option("tol", 1e-5)))
    else:
        found = model_stock(products)
    return [float(factor) for factor in found]


def gram(job: TensorJob, workers: Workers) -> np.ndarray:
    """fp64 [terms, terms]: products of any two of the terms, less the base where there is one.

    Sums of blocks of 65,536 elements, each pairwise as numpy adds, whose sums are added without rounding.
    """

    def work(start: int, stop: int) -> list[np.ndarray]:
        return list(_products(job, start, stop, workers))

    parts = list(chain.from_iterable(workers.over(work, elements(job.shape))))
    count = len(job.terms)
    found = np.zeros((count, count))
    for i in range(count):
        for j in range(i + 1):
            found[i, j] = found[j, i] = exact_sum(part[i, j] for part in parts)
    return found


def _products(job: TensorJob, start: int, stop: int, workers: Workers) -> Iterator[np.ndarray]:
    count = len(job.terms)
    if count <= native.VECTORS and native.compiled("products") is not None:
        for block in workers.blocks(start, stop, ELEMENTS_PER_BLOCK * native.WIDER):
            for at in range(0, len(block), ELEMENTS_PER_BLOCK):
                found = np.zeros((count, count))
                found[np.tril_indices(count)] = list(
                    chain.from_iterable(
                        native.products(
                            job.terms, job.base, at, min(ELEMENTS_PER_BLOCK, len(block) - at), block
                        )
                    )
                )
                yield found
        return
    for block in workers.blocks(start, stop, ELEMENTS_PER_BLOCK):
        vectors = []
        for number, term in enumerate(job.terms):
            if job.base is None:
                vectors.append(block.wide(term, np.float64))
            else:
                vectors.append(block.difference(term, job.base, block.array(f"vector {number}", np.float64)))
        product, found = block.array("product", np.float64), np.zeros((count, count))
        for i in range(count):
            for j in range(i + 1):
                found[i, j] = np.add.reduce(np.multiply(vectors[i], vectors[j], out=product))
        yield found


def nuslerp(products: np.ndarray, t: float) -> list[float]:
    """Spherical interpolation of two vectors by their directions, `t` the share of the second."""
    first, second = (max(math.sqrt(products[i, i]), FLAT) for i in range(2))
    cosine = min(1.0, max(-1.0, products[0, 1] / first / second))
    if 1 - cosine * cosine <= 1e-16:
        return [1 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def multislerp(products: np.ndarray, weights: np.ndarray, eps: float, name: str) -> np.ndarray:
    """The direction of the weighted mean of the directions, as long as the weighted mean of the lengths.

    mergekit maps the mean of the tangents at that direction back to the sphere; that mean is 0.
    """
    norms = np.sqrt(np.diag(products))
    units = 1 / (norms + eps)
    shares = weights * units
    square = float(shares @ products @ shares)
    length = math.sqrt(max(0.0, square))
    if length < eps:
        if (
            len(weights) == 2 or not products.any() or math.isnan(square)
        ):  # nothing has a direction, or none is known
            return weights
        raise UserError(f"{name}: multislerp of directions that cancel each other; give other weights")
    return shares / length * (norms @ weights)


def karcher(products: np.ndarray, max_iter: int, tol: float) -> np.ndarray:
    """The point of the sphere with the least sum of squared angles to all directions, times the mean length."""
    norms = np.sqrt(np.diag(products))
    valid = norms > tol
    if not valid.any():
        return np.zeros(len(norms))
    inverse = np.where(valid, 1 / np.where(valid, norms, 1), 0)
    cosines = products * np.outer(inverse, inverse)
    shares = valid / valid.sum()

    def length(vector: np.ndarray) -> float:
        return math.sqrt(max(0.0, vector @ cosines @ vector))

    if length(shares) < tol:
        mean = np.eye(len(norms))[int(np.argmax(valid))]
    else:
        mean = shares / length(shares)
    for _ in range(max_iter):
        dots = np.clip(cosines @ mean, -1, 1)
        angles = np.arccos(dots)
        bent = valid & (angles >= tol)
        pull = np.where(bent, shares * angles / np.where(bent, np.sin(angles), 1), 0)
        tangent = pull - (pull @ dots) * mean
        step = length(tangent)
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) * tangent / step
        if (now := length(mean)) > tol:
            mean = mean / now
    return mean * inverse * norms.mean()


def model_stock(products: np.ndarray) -> list[float]:
    """t / N for each of N differences: how far from the base to their mean, by the mean cosine between them."""
    count = len(products)
    norms = np.sqrt(np.diag(products))
    cosines = [
        min(1.0, max(-1.0, products[i, j] / max(norms[i] * norms[j], TINY)))
        for i in range(count)
        for j in range(i + 1, count)
    ]
    cosine = math.fsum(cosines) / len(cosines)
    below = 1 + (count - 1) * cosine
    t = 0.0 if abs(below) < TINY else count * cosine / below
    return [t / count] * count


def slerp_factors(first: Term, second: Term, t: float, count: int, workers: Workers) -> tuple[float, float]:
    """Of both inputs, for the share `t` of the second: (1 - t, t) where they point almost the same or opposite way.

    Norms and product are fp64 sums of blocks of 65,536 elements, each pairwise as numpy adds, whose sums are added
    without rounding.
    """
    pair = first.source, first.name, second.source, second.name
    cosine = workers.once(pair, lambda: _cosine(first, second, count, workers))
    if not abs(cosine) <= COLINEAR:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin(angle * (1 - t)) / math.sin(angle), math.sin(angle * t) / math.sin(angle)


def _cosine(first: Term, second: Term, count: int, workers: Workers) -> float:
    def work(start: int, stop: int) -> list[tuple[float, ...]]:
        return list(_sums(first, second, start, stop, workers))

    sums = list(chain.from_iterable(workers.over(work, count)))
    aa, bb, ab = (exact_sum(part[i] for part in sums) for i in range(3))
    norms = [norm if (norm := math.sqrt(square)) > SHORTEST else 1.0 for square in (aa, bb)]
    return ab / norms[0] / norms[1]


def _sums(first: Term, second: Term, start: int, stop: int, workers: Workers) -> Iterator[tuple[float, ...]]:
    if native.compiled("products") is not None:
        for block in workers.blocks(start, stop, ELEMENTS_PER_BLOCK * native.WIDER):
            for at in range(0, len(block), ELEMENTS_PER_BLOCK):
                (aa,), (ab, bb) = native.products(
                    (first, second), None, at, min(ELEMENTS_PER_BLOCK, len(block) - at), block
                )
                yield aa, bb, ab
        return
    for block in workers.blocks(start, stop, ELEMENTS_PER_BLOCK):
        a, b = block.wide(first, np.float64), block.wide(second, np.float64)
        product = block.array("product", np.float64)
        yield tuple(float(np.add.reduce(np.multiply(x, y, out=product))) for x, y in ((a, a), (b, b), (a, b)))
