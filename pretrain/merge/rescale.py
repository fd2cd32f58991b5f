"""mergekit's rescaling of a thinned-out difference: what is left gets the L1 norm that the whole had."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain

import numpy as np

from pretrain.merge.blocks import Block, Workers
from pretrain.merge.kernels import BLOCK, Kind

SHORTEST = 1e-7
"""a norm below which nothing is rescaled; mergekit's, so that its files give its results"""

Fill = Callable[[Block, np.ndarray], None]
"""writes a block's difference, or what is left of it, into an array"""


def l1(whole: Fill, left: Fill, kind: Kind, count: int, workers: Workers) -> float:
    """|whole|_1 / |left|_1, or 1 where either is next to nothing.

    Norms are fp64 sums of blocks of 65,536 elements, whose sums are added without rounding.
    """

    def work(start: int, stop: int) -> list[tuple[float, float]]:
        return list(_sums(whole, left, kind, start, stop, workers))

    sums = list(chain.from_iterable(workers.over(work, count)))
    before, after = (math.fsum(part[i] for part in sums) for i in range(2))
    return before / after if before >= SHORTEST and after >= SHORTEST else 1.0


def _sums(
    whole: Fill, left: Fill, kind: Kind, start: int, stop: int, workers: Workers
) -> Iterator[tuple[float, float]]:
    for block in workers.blocks(start, stop, BLOCK):
        found = []
        for fill in (whole, left):
            one = block.array("rescaled", kind)
            fill(block, one)
            found.append(float(np.sum(np.abs(one, out=one), dtype=np.float64)))
        yield found[0], found[1]
