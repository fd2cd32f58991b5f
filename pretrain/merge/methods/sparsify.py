"""Selects entries of differences by magnitude and combines them by sign.

TIES (arXiv 2306.01708) trims: it keeps only the largest entries of each difference (`trim_thresholds`). Then it elects
one sign per entry (`elected_sum`). Breadcrumbs also removes the very largest entries. `l1_ratio` is the factor that
restores a difference's L1 norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product

import numpy as np

from pretrain.merge.merge_plan import Term
from pretrain.merge.methods import native
from pretrain.merge.methods.blocks import Block, Workers, spans
from pretrain.merge.methods.task_vectors import NO_ENTRIES, SparseTaskVector, Threshold
from pretrain.weights.dtypes import BITS, ELEMENTS_PER_BLOCK, Accumulator, exact_sum

BINS = 1 << 16  # of a histogram over one half (16 bits) of the magnitude keys
MAX_BINS_PER_SPAN = 1 << 14  # a span's histogram is kept if it has at most this many non-empty bins
# Kept bins of all spans (24 MiB). Beyond it, spans in which a threshold may end are counted again.
MAX_BINS = 1 << 22
# Key of every NaN, because the NaN payload that a subtraction returns differs between processors.
NAN_KEY = 0x7F800001
MIN_NORM = (
    1e-7  # smaller L1 norms are not rescaled; mergekit's bound, so that its files give the same results
)
NonEmptyBins = tuple[np.ndarray, np.ndarray]  # numbers of the non-empty bins of a histogram, and their counts
# Writes a block's elements of a sparse task vector to an array.
WriteDifference = Callable[[SparseTaskVector, Term, Block, np.ndarray], None]


def trim_thresholds(
    sizes: Sequence[tuple[Term, int]], base: Term, kind: Accumulator, count: int, workers: Workers
) -> list[Threshold | None]:
    """TIES' trim: per (term, size) the threshold that selects the `size` largest of the `count` entries of x - base.

    Among equal magnitudes the first entries are selected. None selects all entries (size >= count).
    """
    span_list = list(spans(count))
    keys_of = {
        number: DifferenceKeys(term, base, kind, workers)
        for number, (term, size) in enumerate(sizes)
        if size < count
    }
    tensors = {(keys.term.source, keys.term.name): keys for keys in keys_of.values()}

    # 1. A histogram of the keys' upper halves finds the bin that contains the threshold.
    upper = {tensor: np.zeros(BINS, np.int64) for tensor in tensors}
    work = product(span_list, tensors)
    for tensor, histogram in workers.map(
        lambda task: (task[1], tensors[task[1]].histogram(*task[0], -1)), work
    ):
        upper[tensor] += histogram
    bins = {
        number: bin_of_rank(upper[keys.term.source, keys.term.name], sizes[number][1])
        for number, keys in keys_of.items()
    }

    # 2. A histogram of the lower halves within that bin finds the key. The histogram of a span with few bins is kept.
    lower = {number: np.zeros(BINS, np.int64) for number in keys_of}
    by_span: dict[int, list[NonEmptyBins | None]] = {number: [] for number in keys_of}
    lower_work, bins_left = product(span_list, keys_of), MAX_BINS
    for number, filled in workers.map(
        lambda task: (task[1], keys_of[task[1]].non_empty_bins(*task[0], bins[task[1]][0])), lower_work
    ):
        lower[number][filled[0]] += filled[1]
        kept = len(filled[0]) <= min(MAX_BINS_PER_SPAN, bins_left)
        bins_left -= len(filled[0]) if kept else 0
        by_span[number].append(filled if kept else None)

    # 3. The entries equal to the key are counted span by span, to find the element at which the threshold ends.
    thresholds: list[Threshold | None] = [None] * len(sizes)
    for number, keys in keys_of.items():
        high, rank = bins[number]
        low, rank = bin_of_rank(lower[number], rank)
        thresholds[number] = _threshold_at(keys, span_list, by_span[number], high * BINS + low, rank)
    return thresholds


def _threshold_at(
    keys: DifferenceKeys,
    span_list: Sequence[tuple[int, int]],
    by_span: Sequence[NonEmptyBins | None],
    key: int,
    rank: int,
) -> Threshold:
    """The threshold that ends after the `rank`-th entry equal to `key`.

    by_span: lower histogram of every span; None if it was not kept.
    """
    for (start, stop), filled in zip(span_list, by_span, strict=True):
        if filled is None:
            equal = keys.nth_equal(start, stop, key, BINS * BINS)[1]
        else:
            equal = int(filled[1][filled[0] == key % BINS].sum())
        if rank <= equal:
            return Threshold(key, keys.nth_equal(start, stop, key, rank)[0])
        rank -= equal
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class DifferenceKeys:
    """Magnitude keys of x - base, computed one block at a time and not stored."""

    term: Term
    base: Term
    kind: Accumulator
    workers: Workers

    def histogram(self, start: int, stop: int, high: int) -> np.ndarray:
        """uint32 [65536]: histogram of the keys' upper halves, or for high >= 0 of the lower halves of the keys whose
        upper half is `high`."""
        counts = np.zeros(BINS, np.uint32)
        for block in self._blocks(start, stop):
            if _compiled():
                native.histogram(self.term, self.base, self.kind, high, block, counts)
                continue
            keys = self._keys(block)
            halves = keys >> 16 if high < 0 else keys[keys >> 16 == high] & 0xFFFF
            counts += np.bincount(halves.astype(np.intp), minlength=BINS).astype(np.uint32)
        return counts

    def non_empty_bins(self, start: int, stop: int, high: int) -> NonEmptyBins:
        """The non-empty bins of such a histogram: their numbers, uint16, and their counts, uint32."""
        counts = self.histogram(start, stop, high)
        numbers = np.flatnonzero(counts).astype(np.uint16)
        return numbers, counts[numbers]

    def nth_equal(self, start: int, stop: int, key: int, rank: int) -> tuple[int, int]:
        """The element after the `rank`-th one whose key is `key`, else `stop`; and the number of such keys before."""
        counted = 0
        for block in self._blocks(start, stop):
            if _compiled():
                end, equal = native.nth_equal(self.term, self.base, self.kind, key, rank - counted, block)
                if counted + equal == rank:
                    return end, rank
            else:
                positions = np.flatnonzero(self._keys(block) == key)
                equal = len(positions)
                if counted + equal >= rank:
                    return block.start + int(positions[rank - counted - 1]) + 1, rank
            counted += equal
        return stop, counted

    def _blocks(self, start: int, stop: int) -> Iterator[Block]:
        return self.workers.blocks(
            start, stop, self.workers.block * (native.BLOCKS_PER_PASS if _compiled() else 1)
        )

    def _keys(self, block: Block) -> np.ndarray:
        return _magnitude_keys(
            block.difference(self.term, self.base, block.array("difference", self.kind)), block
        )


def _compiled() -> bool:
    return native.compiled_function("histogram", np.float32) is not None


def bin_of_rank(histogram: np.ndarray, rank: int) -> tuple[int, int]:
    """The bin of the `rank`-th largest key (counted from 1), and the key's rank within that bin."""
    at_least = np.cumsum(histogram[::-1])[::-1]
    number = int(np.flatnonzero(at_least >= rank)[-1])
    return number, rank - int(at_least[number] - histogram[number])


def _magnitude_keys(difference: np.ndarray, block: Block) -> np.ndarray:
    keys = block.array("keys", np.uint32)
    np.copyto(keys.view(np.float32), difference, casting="same_kind")
    np.bitwise_and(keys, 0x7FFFFFFF, out=keys)
    return np.minimum(keys, np.uint32(NAN_KEY), out=keys)


def selected(difference: np.ndarray, threshold: Threshold, block: Block) -> np.ndarray:
    """bool [len(block)]: the entries of a block's difference that the threshold selects."""
    keys, mask = _magnitude_keys(difference, block), block.array("selected", bool)
    if block.stop <= threshold.end:
        return np.greater_equal(keys, np.uint32(threshold.key), out=mask)
    np.greater(keys, np.uint32(threshold.key), out=mask)
    if block.start < threshold.end:
        split = threshold.end - block.start
        np.greater_equal(keys[:split], np.uint32(threshold.key), out=mask[:split])
    return mask


def zero_unless(values: np.ndarray, condition: np.ndarray, block: Block) -> None:
    """Set `values` to zero in place where `condition` is False. Masks bits, because 0 times infinity is NaN."""
    bits = BITS[values.dtype]
    mask = block.array("mask", bits)
    np.copyto(mask, condition)
    np.subtract(0, mask, out=mask)
    np.bitwise_and(values.view(bits), mask, out=values.view(bits))


def elected_sum(
    weighted: Sequence[np.ndarray], weights: Sequence[np.floating] | None, block: Block
) -> np.ndarray:
    """Per entry, the sum of the weighted differences that have the sign of the sum of all (zero counts as positive).

    With `weights`, each entry is divided by the sum of the weights that agree in sign. Overwrites `weighted`.
    """
    kind = weighted[0].dtype
    sign, total, share = (block.array(name, kind) for name in ("sign", "total", "share"))
    np.copyto(total, weighted[0])
    for difference in weighted[1:]:
        np.add(total, difference, out=total)
    np.copyto(sign, total >= 0)
    np.multiply(sign, kind.type(2), out=sign)
    np.subtract(sign, kind.type(1), out=sign)
    total[:] = 0
    share[:] = 0
    for number, difference in enumerate(weighted):
        np.multiply(difference, sign, out=difference)
        np.maximum(difference, 0, out=difference)
        np.add(total, difference, out=total)
        if weights is not None:
            agrees = block.array("agrees", kind)
            np.copyto(agrees, difference > 0)
            np.multiply(agrees, weights[number], out=agrees)
            np.add(share, agrees, out=share)
    if weights is not None:
        share[share == 0] = 1
        np.divide(total, share, out=total)
    return np.multiply(total, sign, out=total)


def breadcrumbs_thresholds(
    terms: Sequence[Term], base: Term, gamma: float, kind: Accumulator, count: int, workers: Workers
) -> list[tuple[Threshold | None, Threshold | None]]:
    """Per term the thresholds (kept, outliers) of x - base; None keeps all entries, or removes none.

    Below the int(gamma * count) largest entries, int(density * count) entries are kept; among equal magnitudes the
    first. As in mergekit, fewer outliers are removed if the density asks for more entries than are left.
    """
    sizes = []
    for term in terms:
        kept = int(term.density * count) if term.density < 1 else count
        outer = min(count, kept + int(gamma * count)) if kept else 0
        sizes.append((kept, outer))
    requests = [
        (term, size)
        for term, (kept, outer) in zip(terms, sizes, strict=True)
        for size in (outer, outer - kept)
        if size > 0
    ]
    thresholds = dict(zip(requests, trim_thresholds(requests, base, kind, count, workers), strict=True))
    return [
        (thresholds.get((term, outer)), thresholds.get((term, outer - kept))) if kept else (NO_ENTRIES, None)
        for term, (kept, outer) in zip(terms, sizes, strict=True)
    ]


def l1_ratio(
    vector: SparseTaskVector,
    base: Term,
    write_difference: WriteDifference,
    kind: Accumulator,
    count: int,
    workers: Workers,
) -> float:
    """L1 norm of x - base divided by the L1 norm of the sparse task vector; 1 if either is below MIN_NORM.

    Norms are fp64 sums over blocks of 65,536 elements: pairwise within a block, as numpy adds; exact between blocks.
    """

    def work(start: int, stop: int) -> list[tuple[float, float]]:
        return list(_l1_norms(vector, base, write_difference, kind, start, stop, workers))

    norms = list(chain.from_iterable(workers.map_spans(work, count)))
    before, after = (exact_sum(pair[i] for pair in norms) for i in range(2))
    return before / after if before >= MIN_NORM and after >= MIN_NORM else 1.0


def _l1_norms(
    vector: SparseTaskVector,
    base: Term,
    write_difference: WriteDifference,
    kind: Accumulator,
    start: int,
    stop: int,
    workers: Workers,
) -> Iterator[tuple[float, float]]:
    """Per block of 65,536 elements, the L1 norms of the full difference and of the sparse task vector."""
    if native.compiled_function("norms", kind) is not None:
        for block in workers.blocks(start, stop, ELEMENTS_PER_BLOCK * native.BLOCKS_PER_PASS):
            for at in range(0, len(block), ELEMENTS_PER_BLOCK):
                yield native.norms(vector, base, kind, at, min(ELEMENTS_PER_BLOCK, len(block) - at), block)
        return
    for block in workers.blocks(start, stop, ELEMENTS_PER_BLOCK):
        difference, magnitude = block.array("rescaled", kind), block.array("magnitude", np.float64)
        sums = []
        for entries in (SparseTaskVector(vector.term), vector):
            write_difference(entries, base, block, difference)
            np.copyto(magnitude, difference)
            sums.append(float(np.add.reduce(np.abs(magnitude, out=magnitude))))
        yield sums[0], sums[1]
