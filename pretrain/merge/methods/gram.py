"""Methods whose factors depend only on norms and angles: SLERP, NuSLERP, Multi-SLERP, Karcher mean, Model Stock.

One pass over the tensors computes their Gram matrix, fp64 [terms, terms]; the factors are arithmetic on that matrix.
With a base, the vectors are the differences x_i - base, and their weighted sum is added to the base. All methods follow
mergekit 0.1.5; the Karcher mean is arXiv 2603.04972 and Model Stock is arXiv 2403.19522.
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

# mergekit's bounds, so that its files give the same results.
NUSLERP_MIN_NORM = 1e-7  # nuslerp: smaller norms count as this one
MODEL_STOCK_MIN = 1e-6  # model_stock: a smaller denominator gives no estimate
SLERP_COLINEAR = 0.9995  # slerp: a larger absolute cosine is interpolated linearly
SLERP_MIN_NORM = 1e-8  # slerp: a norm that is not larger counts as 1


def gram_factors(job: TensorJob, workers: Workers) -> list[float]:
    """One factor per term of the job. Raises UserError if Multi-SLERP's directions cancel each other."""
    if len(job.terms) == 1:  # terms of weight 0 are not in the job
        return [abs(job.terms[0].weight) if job.method == "multislerp" else 1.0]
    key = "gram", tuple((term.source, term.name) for term in job.reads)
    products = workers.cached(key, lambda: gram(job, workers))
    weights = np.array([term.weight for term in job.terms])
    factors: Sequence[float] | np.ndarray
    if job.method == "nuslerp":
        factors = nuslerp(products, float(job.option("t", 0.5)))
    elif job.method == "multislerp":
        factors = multislerp(products, weights, float(job.option("eps", 1e-8)), job.name)
    elif job.method == "karcher":
        factors = karcher(products, int(job.option("max_iter", 10)), float(job.option("tol", 1e-5)))
    else:
        factors = model_stock(products)
    return [float(factor) for factor in factors]


def gram(job: TensorJob, workers: Workers) -> np.ndarray:
    """Gram matrix of the terms (minus the base, if there is one), fp64 [terms, terms].

    Sums run over blocks of 65,536 elements: pairwise within a block, as numpy adds; exact between blocks.
    """

    def work(start: int, stop: int) -> list[np.ndarray]:
        return list(_block_products(job, start, stop, workers))

    blocks = list(chain.from_iterable(workers.map_spans(work, elements(job.shape))))
    count = len(job.terms)
    total = np.zeros((count, count))
    for i in range(count):
        for j in range(i + 1):
            total[i, j] = total[j, i] = exact_sum(block[i, j] for block in blocks)
    return total


def _block_products(job: TensorJob, start: int, stop: int, workers: Workers) -> Iterator[np.ndarray]:
    """Lower triangle of the Gram matrix per block of 65,536 elements, fp64 [terms, terms]."""
    count = len(job.terms)
    if count <= native.MAX_VECTORS and native.compiled_function("products") is not None:
        for block in workers.blocks(start, stop, ELEMENTS_PER_BLOCK * native.BLOCKS_PER_PASS):
            for at in range(0, len(block), ELEMENTS_PER_BLOCK):
                products = np.zeros((count, count))
                products[np.tril_indices(count)] = list(
                    chain.from_iterable(
                        native.products(
                            job.terms, job.base, at, min(ELEMENTS_PER_BLOCK, len(block) - at), block
                        )
                    )
                )
                yield products
        return
    for block in workers.blocks(start, stop, ELEMENTS_PER_BLOCK):
        vectors = []
        for number, term in enumerate(job.terms):
            if job.base is None:
                vectors.append(block.wide(term, np.float64))
            else:
                vectors.append(block.difference(term, job.base, block.array(f"vector {number}", np.float64)))
        product, products = block.array("product", np.float64), np.zeros((count, count))
        for i in range(count):
            for j in range(i + 1):
                products[i, j] = np.add.reduce(np.multiply(vectors[i], vectors[j], out=product))
        yield products


def nuslerp(products: np.ndarray, t: float) -> list[float]:
    """Factors of the spherical interpolation of two vectors; `t` is the share of the second. products: [2, 2]."""
    first, second = (max(math.sqrt(products[i, i]), NUSLERP_MIN_NORM) for i in range(2))
    cosine = min(1.0, max(-1.0, products[0, 1] / first / second))
    if 1 - cosine * cosine <= 1e-16:
        return [1 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def multislerp(products: np.ndarray, weights: np.ndarray, eps: float, name: str) -> np.ndarray:
    """Factors, [terms], whose sum has the weighted mean direction and the weighted mean length of the vectors.

    mergekit also maps the mean tangent at that direction back to the sphere; that mean is 0, so nothing changes.
    Raises UserError for the tensor `name` if three or more directions cancel each other.
    """
    norms = np.sqrt(np.diag(products))
    units = 1 / (norms + eps)
    shares = weights * units
    square = float(shares @ products @ shares)
    length = math.sqrt(max(0.0, square))
    if length < eps:
        # Two opposite vectors, zeros only, or NaN: no mean direction exists, so the weighted sum is the result.
        if len(weights) == 2 or not products.any() or math.isnan(square):
            return weights
        raise UserError(
            f"{name}: the directions cancel each other, so multislerp is undefined; use other weights"
        )
    return shares / length * (norms @ weights)


def karcher(products: np.ndarray, max_iter: int, tol: float) -> np.ndarray:
    """Factors, [terms], of the Karcher mean: the direction with the least sum of squared angles, times the mean length.

    Gradient descent on the sphere: at most `max_iter` steps, until a step is shorter than `tol`. Vectors with a norm up
    to `tol` are ignored.
    """
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
        curved = valid & (angles >= tol)
        pull = np.where(curved, shares * angles / np.where(curved, np.sin(angles), 1), 0)
        tangent = pull - (pull @ dots) * mean
        step = length(tangent)
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) * tangent / step
        if (norm := length(mean)) > tol:
            mean = mean / norm
    return mean * inverse * norms.mean()


def model_stock(products: np.ndarray) -> list[float]:
    """The factor t / N for each of N differences, where t = N cos / (1 + (N - 1) cos) and cos is the mean pair cosine.

    The result is then base + t * (mean of the models - base).
    """
    count = len(products)
    norms = np.sqrt(np.diag(products))
    cosines = [
        min(1.0, max(-1.0, products[i, j] / max(norms[i] * norms[j], MODEL_STOCK_MIN)))
        for i in range(count)
        for j in range(i + 1, count)
    ]
    cosine = math.fsum(cosines) / len(cosines)
    denominator = 1 + (count - 1) * cosine
    t = 0.0 if abs(denominator) < MODEL_STOCK_MIN else count * cosine / denominator
    return [t / count] * count


def slerp_factors(first: Term, second: Term, t: float, count: int, workers: Workers) -> tuple[float, float]:
    """SLERP factors of two inputs, where `t` is the share of the second; (1 - t, t) if they are almost colinear or NaN.

    Norms and the product are fp64 sums over blocks of 65,536 elements: pairwise within a block, as numpy adds; exact
    between blocks.
    """
    pair = first.source, first.name, second.source, second.name
    cosine = workers.cached(pair, lambda: _cosine(first, second, count, workers))
    if not abs(cosine) <= SLERP_COLINEAR:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin(angle * (1 - t)) / math.sin(angle), math.sin(angle * t) / math.sin(angle)


def _cosine(first: Term, second: Term, count: int, workers: Workers) -> float:
    def work(start: int, stop: int) -> list[tuple[float, ...]]:
        return list(_pair_products(first, second, start, stop, workers))

    sums = list(chain.from_iterable(workers.map_spans(work, count)))
    aa, bb, ab = (exact_sum(block[i] for block in sums) for i in range(3))
    norms = [norm if (norm := math.sqrt(square)) > SLERP_MIN_NORM else 1.0 for square in (aa, bb)]
    return ab / norms[0] / norms[1]


def _pair_products(
    first: Term, second: Term, start: int, stop: int, workers: Workers
) -> Iterator[tuple[float, ...]]:
    """a.a, b.b and a.b per block of 65,536 elements."""
    if native.compiled_function("products") is not None:
        for block in workers.blocks(start, stop, ELEMENTS_PER_BLOCK * native.BLOCKS_PER_PASS):
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
