"""TIES (arXiv 2306.01708): each difference cut down to its largest entries, a sign elected for every entry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, product

import numpy as np

from pretrain.merge.merge_plan import Term
from pretrain.merge.methods import native, sparsify
from pretrain.merge.methods.blocks import Block, Workers, spans
from pretrain.merge.methods.task_vectors import NOTHING, SparseTaskVector, Threshold
from pretrain.weights.dtypes import BITS, ELEMENTS_PER_BLOCK, Accumulator, exact_sum

HALF = 1 << 16
FEW = 1 << 14
"""bins of a span's histogram that are kept"""
ROOM = 1 << 22
"""bins of all spans that are kept, 24 MiB: the rest is counted again where the cut may end there"""
NAN = 0x7F800001
"""the key of every NaN: which payload comes out of a subtraction differs between processors"""
Filled = tuple[np.ndarray, np.ndarray]
"""bins of a histogram that are not empty, and their entries"""
SHORTEST = 1e-7
"""a norm below which nothing is rescaled; mergekit's, so that its files give its results"""
Fill = Callable[[SparseTaskVector, Term, Block, np.ndarray], None]
"""writes what is left of a block's difference to the base into an array"""


def cuts(
    asked: Sequence[tuple[Term, int]], base: Term, kind: Accumulator, count: int, workers: Workers
) -> list[Threshold | None]:
    """For every term and number of entries the cut in which exactly so many of x - base are, of equal ones the first;
    None for all of them.

    Two passes over the tensors: a histogram of the keys' upper halves, and one of the lower halves within the bin
    where the cut falls, which is kept span by span as far as it has few bins; then a look at the span where it ends.
    """
    tiles = list(spans(count))
    looks = {
        number: Look(term, base, kind, workers)
        for number, (term, wanted) in enumerate(asked)
        if wanted < count
    }
    tensors = {(look.term.source, look.term.name): look for look in looks.values()}

    upper = {tensor: np.zeros(HALF, np.int64) for tensor in tensors}
    work = product(tiles, tensors)
    for tensor, found in workers.each(lambda one: (one[1], tensors[one[1]].histogram(*one[0], -1)), work):
        upper[tensor] += found
    bins = {
        number: largest(upper[look.term.source, look.term.name], asked[number][1])
        for number, look in looks.items()
    }

    lower = {number: np.zeros(HALF, np.int64) for number in looks}
    parts: dict[int, list[Filled | None]] = {number: [] for number in looks}
    halves, room = product(tiles, looks), ROOM
    for number, filled in workers.each(
        lambda one: (one[1], looks[one[1]].filled(*one[0], bins[one[1]][0])), halves
    ):
        lower[number][filled[0]] += filled[1]
        kept = len(filled[0]) <= min(FEW, room)
        room -= len(filled[0]) if kept else 0
        parts[number].append(filled if kept else None)

    made: list[Threshold | None] = [None] * len(asked)
    for number, look in looks.items():
        high, wanted = bins[number]
        low, wanted = largest(lower[number], wanted)
        made[number] = _end(look, tiles, parts[number], high * HALF + low, wanted)
    return made


def _end(
    look: Look,
    tiles: Sequence[tuple[int, int]],
    parts: Sequence[Filled | None],
    key: int,
    wanted: int,
) -> Threshold:
    """The cut at the `wanted`-th entry that equals `key`; parts: lower histograms by span, None where not kept."""
    for (start, stop), part in zip(tiles, parts, strict=True):
        if part is None:
            equal = look.place(start, stop, key, HALF * HALF)[1]
        else:
            equal = int(part[1][part[0] == key % HALF].sum())
        if wanted <= equal:
            return Threshold(key, look.place(start, stop, key, wanted)[0])
        wanted -= equal
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class Look:
    """The keys of x - base, span by span."""

    term: Term
    base: Term
    kind: Accumulator
    workers: Workers

    def histogram(self, start: int, stop: int, high: int) -> np.ndarray:
        """[65536] of the keys' upper halves; for high >= 0 of the lower halves of those with that upper one."""
        found = np.zeros(HALF, np.uint32)
        for block in self._blocks(start, stop):
            if _compiled():
                native.histogram(self.term, self.base, self.kind, high, block, found)
                continue
            keys = self._keys(block)
            halves = keys >> 16 if high < 0 else keys[keys >> 16 == high] & 0xFFFF
            found += np.bincount(halves.astype(np.intp), minlength=HALF).astype(np.uint32)
        return found

    def filled(self, start: int, stop: int, high: int) -> Filled:
        """The bins of such a histogram that are not empty, and their entries."""
        found = self.histogram(start, stop, high)
        values = np.flatnonzero(found).astype(np.uint16)
        return values, found[values]

    def place(self, start: int, stop: int, key: int, wanted: int) -> tuple[int, int]:
        """The element after the `wanted`-th one whose key is `key`, or `stop`; and how many there are up to it."""
        seen = 0
        for block in self._blocks(start, stop):
            if _compiled():
                end, equal = native.place(self.term, self.base, self.kind, key, wanted - seen, block)
                if seen + equal == wanted:
                    return end, wanted
            else:
                places = np.flatnonzero(self._keys(block) == key)
                equal = len(places)
                if seen + equal >= wanted:
                    return block.start + int(places[wanted - seen - 1]) + 1, wanted
            seen += equal
        return stop, seen

    def _blocks(self, start: int, stop: int) -> Iterator[Block]:
        return self.workers.blocks(start, stop, self.workers.block * (native.WIDER if _compiled() else 1))

    def _keys(self, block: Block) -> np.ndarray:
        return _keys(block.difference(self.term, self.base, block.array("difference", self.kind)), block)


def _compiled() -> bool:
    return native.compiled("histogram", np.float32) is not None


def largest(histogram: np.ndarray, wanted: int) -> tuple[int, int]:
    """The bin in which the `wanted`-th largest key lies, and which one it is there."""
    at_least = np.cumsum(histogram[::-1])[::-1]
    place = int(np.flatnonzero(at_least >= wanted)[-1])
    return place, wanted - int(at_least[place] - histogram[place])


def _keys(difference: np.ndarray, block: Block) -> np.ndarray:
    keys = block.array("keys", np.uint32)
    np.copyto(keys.view(np.float32), difference, casting="same_kind")
    np.bitwise_and(keys, 0x7FFFFFFF, out=keys)
    return np.minimum(keys, np.uint32(NAN), out=keys)


def within(difference: np.ndarray, cut: Threshold, block: Block) -> np.ndarray:
    """Which entries of a block's difference are in the cut."""
    keys, found = _keys(difference, block), block.array("within", bool)
    if block.stop <= cut.end:
        return np.greater_equal(keys, np.uint32(cut.key), out=found)
    np.greater(keys, np.uint32(cut.key), out=found)
    if block.start < cut.end:
        ends = cut.end - block.start
        np.greater_equal(keys[:ends], np.uint32(cut.key), out=found[:ends])
    return found


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


def bands(
    terms: Sequence[Term], base: Term, gamma: float, kind: Accumulator, count: int, workers: Workers
) -> list[tuple[Threshold | None, Threshold | None]]:
    """For every term what stays of x - base, and what of that goes as too large (None: all, and nothing), so that
    int(density * count) entries are left below the int(gamma * count) largest, of equal ones the first. As in
    mergekit, fewer of the largest go where the density asks for more than is left."""
    sizes = []
    for term in terms:
        stay = int(term.density * count) if term.density < 1 else count
        outer = min(count, stay + int(gamma * count)) if stay else 0
        sizes.append((stay, outer))
    asked = [
        (term, size)
        for term, (stay, outer) in zip(terms, sizes, strict=True)
        for size in (outer, outer - stay)
    ]
    needed = [one for one in asked if one[1] > 0]
    found = dict(zip(needed, sparsify.cuts(needed, base, kind, count, workers), strict=True))
    return [
        (found.get((term, outer)), found.get((term, outer - stay))) if stay else (NOTHING, None)
        for term, (stay, outer) in zip(terms, sizes, strict=True)
    ]


def l1(part: SparseTaskVector, base: Term, fill: Fill, kind: Accumulator, count: int, workers: Workers) -> float:
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
    part: SparseTaskVector, base: Term, fill: Fill, kind: Accumulator, start: int, stop: int, workers: Workers
) -> Iterator[tuple[float, float]]:
    if native.compiled("norms", kind) is not None:
        for block in workers.blocks(start, stop, ELEMENTS_PER_BLOCK * native.WIDER):
            for at in range(0, len(block), ELEMENTS_PER_BLOCK):
                yield native.norms(part, base, kind, at, min(ELEMENTS_PER_BLOCK, len(block) - at), block)
        return
    for block in workers.blocks(start, stop, ELEMENTS_PER_BLOCK):
        one, size = block.array("rescaled", kind), block.array("size", np.float64)
        found = []
        for what in (SparseTaskVector(part.term), part):
            fill(what, base, block, one)
            np.copyto(size, one)
            found.append(float(np.add.reduce(np.abs(size, out=size))))
        yield found[0], found[1]
