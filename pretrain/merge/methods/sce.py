"""SCE (FuseChat, arXiv 2408.07990), as in mergekit 0.1.5: select, calculate, erase.

1. Select the entries whose variance between the models' differences is largest.
2. Weight each model by the mean square of its selected differences.
3. Erase the entries that disagree with the elected sign.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pretrain.merge.merge_plan import TensorJob, Term
from pretrain.merge.methods.blocks import Block, Workers, spans
from pretrain.merge.methods.sparsify import BINS, bin_of_rank
from pretrain.merge.methods.task_vectors import Threshold
from pretrain.weights.dtypes import ELEMENTS_PER_BLOCK, Accumulator, elements, exact_sum

# mergekit's bound: if the mean squares sum to less, all models have the same weight; divisors are at least this large.
MIN_WEIGHT_SUM = 1e-6


def prepare(job: TensorJob, kind: Accumulator, workers: Workers) -> Callable[[Block], np.ndarray]:
    """The function of a block that returns base + sum_i w_i d_i / sum_i w_i, in the accumulation type.

    Both sums run over the differences that agree with the elected sign of an entry.
    """
    base, count = job.base, elements(job.shape)
    assert base is not None
    share = float(job.option("select_topk", 1.0))
    threshold = _variance_threshold(job.terms, base, share, kind, count, workers) if share < 1 else None
    weights = [kind(weight) for weight in _weights(job.terms, base, threshold, share, kind, count, workers)]

    def compute(block: Block) -> np.ndarray:
        differences = _selected_differences(job.terms, base, threshold, share, kind, block)
        majority = np.where(sum(differences) >= 0, kind(1), kind(-1))
        total, divisor = block.array("total", kind), block.array("divisor", kind)
        total[:], divisor[:] = 0, 0
        for difference, weight in zip(differences, weights, strict=True):
            agrees = np.sign(difference) == majority
            np.add(total, np.where(agrees, difference * weight, kind(0)), out=total)
            np.add(divisor, np.where(agrees, weight, kind(0)), out=divisor)
        np.divide(total, np.maximum(divisor, kind(MIN_WEIGHT_SUM)), out=total)
        return np.add(block.wide(base, kind), total, out=total)

    return compute


def _selected_differences(
    terms: Sequence[Term],
    base: Term,
    threshold: Threshold | None,
    share: float,
    kind: Accumulator,
    block: Block,
) -> list[np.ndarray]:
    """x_i - base per term, with the entries that are not selected set to zero."""
    differences = [
        block.difference(term, base, block.array(f"difference {i}", kind)) for i, term in enumerate(terms)
    ]
    if share < 1:
        if threshold is None:
            selected = np.zeros(len(block), bool)
        else:
            selected = _above(_variance_keys(differences), threshold, block)
        for difference in differences:
            difference[~selected] = 0
    return differences


def _variance_keys(differences: Sequence[np.ndarray]) -> np.ndarray:
    """Bits of the variance between the models as float32, which sort as the variances do."""
    return np.var(np.stack(differences), axis=0).astype(np.float32).view(np.uint32)


def _above(keys: np.ndarray, threshold: Threshold, block: Block) -> np.ndarray:
    before_end = np.arange(block.start, block.stop) < threshold.end
    return (keys > threshold.key) | ((keys == threshold.key) & before_end)


def _variance_threshold(
    terms: Sequence[Term], base: Term, share: float, kind: Accumulator, count: int, workers: Workers
) -> Threshold | None:
    """The threshold of the int(share * n) entries of largest variance, where n entries have a variance above 0.

    Among equal variances the first entries are selected. None selects no entry.
    """

    def keys(start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        for block in workers.blocks(start, stop, ELEMENTS_PER_BLOCK):
            yield block.start, _variance_keys(_selected_differences(terms, base, None, 1.0, kind, block))

    def histogram(half: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        def work(start: int, stop: int) -> np.ndarray:
            return sum(
                (np.bincount(half(block_keys), minlength=BINS) for _, block_keys in keys(start, stop)),
                np.zeros(BINS, np.int64),
            )

        return sum(workers.map_spans(work, count), np.zeros(BINS, np.int64))

    def count_varying(start: int, stop: int) -> int:
        return sum(int(np.count_nonzero(block_keys)) for _, block_keys in keys(start, stop))

    rank = int(sum(workers.map_spans(count_varying, count)) * share)
    if rank <= 0:
        return None
    high, rank = bin_of_rank(histogram(lambda block_keys: block_keys >> 16), rank)
    low, rank = bin_of_rank(histogram(lambda k: k[k >> 16 == high] & 0xFFFF), rank)
    key = high * BINS + low
    for start, stop in spans(count):
        for block_start, block_keys in keys(start, stop):
            positions = np.flatnonzero(block_keys == key)
            if rank <= len(positions):
                return Threshold(key, block_start + int(positions[rank - 1]) + 1)
            rank -= len(positions)
    raise AssertionError("unreachable")


def _weights(
    terms: Sequence[Term],
    base: Term,
    threshold: Threshold | None,
    share: float,
    kind: Accumulator,
    count: int,
    workers: Workers,
) -> list[float]:
    """Per term the mean square of its selected differences, divided by the sum of these means.

    Squares are summed in fp64 per block of 65,536 elements, and exactly between blocks.
    """

    def work(start: int, stop: int) -> list[list[float]]:
        return [
            [
                float(np.add.reduce(np.square(difference, dtype=np.float64)))
                for difference in _selected_differences(terms, base, threshold, share, kind, block)
            ]
            for block in workers.blocks(start, stop, ELEMENTS_PER_BLOCK)
        ]

    sums = [block for span in workers.map_spans(work, count) for block in span]
    squares = [exact_sum(block[i] for block in sums) / max(1, count) for i in range(len(terms))]
    total = sum(squares)
    return (
        [1 / len(terms)] * len(terms)
        if abs(total) < MIN_WEIGHT_SUM
        else [square / total for square in squares]
    )
