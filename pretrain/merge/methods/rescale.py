"""mergekit's rescaling of a thinned-out difference: what is left gets the L1 norm that the whole had."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import numpy as np

from pretrain.merge.merge_plan import Term
from pretrain.merge.methods import native
from pretrain.merge.methods.blocks import Block, Workers
from pretrain.merge.methods.task_vectors import Part
from pretrain.weights.dtypes import BLOCK, Kind, exact_sum

SHORTEST = 1e-7
"""a norm below which nothing is rescaled; mergekit's, so that its files give its results"""

Fill = Callable[[Part, Term, Block, np.ndarray], None]
"""writes what is left of a block's difference to the base into an array"""


def l1(part: Part, base: Term, fill: Fill, kind: Kind, count: int, workers: Workers) -> float:
    """|x - base|_1 over that of the part, or 1 where either is next to nothing.

    Norms are fp64 sums of blocks of 65,536 elements, each pairwise as numpy adds, whose sums are added without
    rounding.
    """

    def work(start: int, stop: int) -> list[tuple[float, float]]:
        return list(_sums(part, base, fill, kind, start, stop, workers))

    sums = list(chain.from_iterable(workers.over(work, count)))
    before, after = (exact_sum(one[i] for one in sums) for i in range(2))
    return before / after if before >= SHORTEST and after >= SHORTEST else 1.0


def _sums(
    part: Part, base: Term, fill: Fill, kind: Kind, start: int, stop: int, workers: Workers
) -> Iterator[tuple[float, float]]:
    if native.compiled("norms", kind) is not None:
        for block in workers.blocks(start, stop, BLOCK * native.WIDER):
            for at in range(0, len(block), BLOCK):
                yield native.norms(part, base, kind, at, min(BLOCK, len(block) - at), block)
        return
    for block in workers.blocks(start, stop, BLOCK):
        one, size = block.array("rescaled", kind), block.array("size", np.float64)
        found = []
        for what in (Part(part.term), part):
            fill(what, base, block, one)
            np.copyto(size, one)
            found.append(float(np.add.reduce(np.abs(size, out=size))))
        yield found[0], found[1]
