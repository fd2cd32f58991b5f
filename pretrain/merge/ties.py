"""TIES (arXiv 2306.01708): each difference cut down to its largest entries, a sign elected for every entry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.merge.blocks import Block, Workers
from pretrain.merge.kernels import BITS, SPAN, Kind
from pretrain.merge.plan import Term

HALF = 1 << 16


@dataclass(frozen=True)
class Cut:
    """Which entries of a difference stay: keys above `key`, and those equal to it before element `end`.

    A key is the bits of the magnitude as float32; they sort as the numbers do, NaN last.
    """

    key: int
    end: int


def cut(term: Term, base: Term, kind: Kind, count: int, workers: Workers) -> Cut | None:
    """The cut that leaves exactly int(density * count) entries of x - base, of equal ones the first; None for all.

    At least one entry stays, as in mergekit.

    Three passes over both tensors: a histogram of the keys' upper halves, one of the lower halves within the bin
    where the cut falls, and the number of entries equal to the cut, span by span.
    """
    wanted = max(1, int(term.density * count))
    if wanted >= count:
        return None

    def keys(start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        for block in workers.blocks(start, stop):
            yield block.start, _keys(block.difference(term, base, block.array("difference", kind)), block)

    def upper(start: int, stop: int) -> np.ndarray:
        return _histogram(found >> 16 for _, found in keys(start, stop))

    def lower(start: int, stop: int) -> np.ndarray:
        return _histogram(found[found >> 16 == high] & 0xFFFF for _, found in keys(start, stop))

    def equal(start: int, stop: int) -> int:
        return sum(int(np.count_nonzero(found == key)) for _, found in keys(start, stop))

    high, wanted = _bin(_sum(workers.over(upper, count)), wanted)
    low, wanted = _bin(_sum(workers.over(lower, count)), wanted)
    key = high * HALF + low
    for number, found in enumerate(list(workers.over(equal, count))):
        if wanted <= found:
            return Cut(key, _end(keys(number * SPAN, min((number + 1) * SPAN, count)), key, wanted))
        wanted -= found
    raise AssertionError("unreachable")


def _histogram(halves: Iterator[np.ndarray]) -> np.ndarray:
    return _sum(np.bincount(half.astype(np.intp), minlength=HALF) for half in halves)


def _sum(histograms: Iterable[np.ndarray]) -> np.ndarray:
    return sum(histograms, np.zeros(HALF, np.int64))


def _bin(histogram: np.ndarray, wanted: int) -> tuple[int, int]:
    """The bin in which the `wanted`-th largest lies, and which one it is there."""
    at_least = np.cumsum(histogram[::-1])[::-1]
    place = int(np.flatnonzero(at_least >= wanted)[-1])
    return place, wanted - int(at_least[place] - histogram[place])


def _end(keys: Iterator[tuple[int, np.ndarray]], key: int, wanted: int) -> int:
    """The element after the `wanted`-th one that equals `key`."""
    for start, found in keys:
        places = np.flatnonzero(found == key)
        if wanted <= len(places):
            return start + int(places[wanted - 1]) + 1
        wanted -= len(places)
    raise AssertionError("unreachable")


def _keys(difference: np.ndarray, block: Block) -> np.ndarray:
    keys = block.array("keys", np.uint32)
    np.copyto(keys.view(np.float32), difference, casting="same_kind")
    return np.bitwise_and(keys, 0x7FFFFFFF, out=keys)


def trim(difference: np.ndarray, kept: Cut | None, block: Block) -> None:
    """Set what is cut off to zero."""
    if kept is None:
        return
    keys, stays = _keys(difference, block), block.array("stays", bool)
    if block.stop <= kept.end:
        np.greater_equal(keys, np.uint32(kept.key), out=stays)
    else:
        np.greater(keys, np.uint32(kept.key), out=stays)
        if block.start < kept.end:
            ends = kept.end - block.start
            np.greater_equal(keys[:ends], np.uint32(kept.key), out=stays[:ends])
    keep(difference, stays, block)


def keep(values: np.ndarray, stays: np.ndarray, block: Block) -> None:
    """Set the others to zero, whatever they are: 0 times infinity would be NaN."""
    bits = BITS[values.dtype]
    mask = block.array("mask", bits)
    np.copyto(mask, stays)
    np.subtract(0, mask, out=mask)
    np.bitwise_and(values.view(bits), mask, out=values.view(bits))


def elect(weighted: Sequence[np.ndarray], weights: Sequence[np.floating] | None, block: Block) -> np.ndarray:
    """Per entry the sum of those differences that have the sign of the sum of all; of zero, the positive ones.

    With `weights` divided by the sum of the weights of those that agree.
    """
    kind = weighted[0].dtype
    sign, total, share = (block.array(use, kind) for use in ("sign", "total", "share"))
    np.copyto(total, weighted[0])
    for one in weighted[1:]:
        np.add(total, one, out=total)
    np.copyto(sign, total >= 0)
    np.multiply(sign, kind.type(2), out=sign)
    np.subtract(sign, kind.type(1), out=sign)
    total[:] = 0
    share[:] = 0
    for number, one in enumerate(weighted):
        np.multiply(one, sign, out=one)
        np.maximum(one, 0, out=one)
        np.add(total, one, out=total)
        if weights is not None:
            agrees = block.array("agrees", kind)
            np.copyto(agrees, one > 0)
            np.multiply(agrees, weights[number], out=agrees)
            np.add(share, agrees, out=share)
    if weights is not None:
        share[share == 0] = 1
        np.divide(total, share, out=total)
    return np.multiply(total, sign, out=total)
