"""Spherical interpolation of a whole tensor: two factors from its norms and the angle between both inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain

import numpy as np

from pretrain.merge.merge_plan import Term
from pretrain.merge.methods import native
from pretrain.merge.methods.blocks import Workers
from pretrain.weights.dtypes import BLOCK, exact_sum

COLINEAR = 0.9995
SHORTEST = 1e-8
"""a norm up to which a tensor has no direction; both numbers are mergekit's, so that its files give its results"""


def factors(first: Term, second: Term, t: float, count: int, workers: Workers) -> tuple[float, float]:
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
        for block in workers.blocks(start, stop, BLOCK * native.WIDER):
            for at in range(0, len(block), BLOCK):
                (aa,), (ab, bb) = native.products(
                    (first, second), None, at, min(BLOCK, len(block) - at), block
                )
                yield aa, bb, ab
        return
    for block in workers.blocks(start, stop, BLOCK):
        a, b = block.wide(first, np.float64), block.wide(second, np.float64)
        product = block.array("product", np.float64)
        yield tuple(float(np.add.reduce(np.multiply(x, y, out=product))) for x, y in ((a, a), (b, b), (a, b)))
