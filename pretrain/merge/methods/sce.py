"""SCE (FuseChat, arXiv 2408.07990), as mergekit 0.1.5 has it: entries that vary most between the differences are
selected, models weighted by the mean square of what is left of theirs, and entries against the elected sign erased."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pretrain.merge.merge_plan import TensorJob, Term
from pretrain.merge.methods.blocks import Block, Workers, spans
from pretrain.merge.methods.sparsify import HALF, largest
from pretrain.merge.methods.task_vectors import Threshold
from pretrain.weights.dtypes import ELEMENTS_PER_BLOCK, Accumulator, elements, exact_sum

LEAST = 1e-6
"""mergekit's bound: of the sum of weights, below which all models weigh the same, and of what is divided by"""


def prepare(job: TensorJob, kind: Accumulator, workers: Workers) -> Callable[[Block], np.ndarray]:
    """A block's elements of base + sum_i w_i d_i over the sum of the w_i of those that agree with the elected sign."""
    base, count = job.base, elements(job.shape)
    assert base is not None
    share = float(job.option("select_topk", 1.0))
    cut = _cut(job.terms, base, share, kind, count, workers) if share < 1 else None
    weights = [kind(weight) for weight in _weights(job.terms, base, cut, share, kind, count, workers)]

    def compute(block: Block) -> np.ndarray:
        differences = _differences(job.terms, base, cut, share, kind, block)
        majority = np.where(sum(differences) >= 0, kind(1), kind(-1))
        total, divisor = block.array("total", kind), block.array("divisor", kind)
        total[:], divisor[:] = 0, 0
        for one, weight in zip(differences, weights, strict=True):
            agrees = np.sign(one) == majority
            np.add(total, np.where(agrees, one * weight, kind(0)), out=total)
            np.add(divisor, np.where(agrees, weight, kind(0)), out=divisor)
        np.divide(total, np.maximum(divisor, kind(LEAST)), out=total)
        return np.add(block.wide(base, kind), total, out=total)

    return compute


def _differences(
    terms: Sequence[Term], base: Term, cut: Threshold | None, share: float, kind: Accumulator, block: Block
) -> list[np.ndarray]:
    """x_i - base, zero where nothing is selected."""
    found = [
        block.difference(term, base, block.array(f"difference {i}", kind)) for i, term in enumerate(terms)
    ]
    if share < 1:
        selected = _within(_keys(found), cut, block) if cut is not None else np.zeros(len(block), bool)
        for one in found:
            one[~selected] = 0
    return found


def _keys(differences: Sequence[np.ndarray]) -> np.ndarray:
    """Bits of the variance over the models as float32, which sort as the numbers do."""
    return np.var(np.stack(differences), axis=0).astype(np.float32).view(np.uint32)


def _within(keys: np.ndarray, cut: Threshold, block: Block) -> np.ndarray:
    first = np.arange(block.start, block.stop) < cut.end
    return (keys > cut.key) | ((keys == cut.key) & first)


def _cut(
    terms: Sequence[Term], base: Term, share: float, kind: Accumulator, count: int, workers: Workers
) -> Threshold | None:
    """The entries of largest variance, int(share * those that vary at all), of equal ones the first; None for none."""

    def keys(start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        for block in workers.blocks(start, stop, ELEMENTS_PER_BLOCK):
            yield block.start, _keys(_differences(terms, base, None, 1.0, kind, block))

    def histogram(pick: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        def work(start: int, stop: int) -> np.ndarray:
            return sum(
                (np.bincount(pick(one), minlength=HALF) for _, one in keys(start, stop)),
                np.zeros(HALF, np.int64),
            )

        return sum(workers.over(work, count), np.zeros(HALF, np.int64))

    varies = sum(
        workers.over(
            lambda start, stop: sum(int(np.count_nonzero(one)) for _, one in keys(start, stop)), count
        )
    )
    wanted = int(varies * share)
    if wanted <= 0:
        return None
    high, wanted = largest(histogram(lambda one: one >> 16), wanted)
    low, wanted = largest(histogram(lambda one: one[one >> 16 == high] & 0xFFFF), wanted)
    key = high * HALF + low
    for start, stop in spans(count):
        for at, one in keys(start, stop):
            places = np.flatnonzero(one == key)
            if wanted <= len(places):
                return Threshold(key, at + int(places[wanted - 1]) + 1)
            wanted -= len(places)
    raise AssertionError("unreachable")


def _weights(
    terms: Sequence[Term],
    base: Term,
    cut: Threshold | None,
    share: float,
    kind: Accumulator,
    count: int,
    workers: Workers,
) -> list[float]:
    """Mean squares of what is selected of each difference, over their sum.

    fp64 sums of blocks of 65,536 elements, whose sums are added without rounding.
    """

    def work(start: int, stop: int) -> list[list[float]]:
        return [
            [
                float(np.add.reduce(np.square(one, dtype=np.float64)))
                for one in _differences(terms, base, cut, share, kind, block)
            ]
            for block in workers.blocks(start, stop, ELEMENTS_PER_BLOCK)
        ]

    sums = [part for found in workers.over(work, count) for part in found]
    squares = [exact_sum(part[i] for part in sums) / max(1, count) for i in range(len(terms))]
    total = sum(squares)
    return [1 / len(terms)] * len(terms) if abs(total) < LEAST else [square / total for square in squares]
