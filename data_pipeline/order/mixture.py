"""How a stream's slots are dealt to its sources: a cycle of integer weights in golden-stride order, in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import numpy as np

GOLDEN_RATIO_64 = 0x9E3779B97F4A7C15  # 2**64 / golden ratio


def floor_sums(n: int, m: int, a: int, b: np.ndarray) -> np.ndarray:
    """Sum over t in [0, n) of floor((a t + b) / m), exactly, for every b >= 0; 0 <= a < m <= 2**31, n <= m, b < 2 m.

    Euclid's algorithm on (m, a), which all elements share, so that it takes some 44 steps at most (the sum of the
    lattice points under a line; Graham, Knuth, Patashnik, Concrete Mathematics, 3.5). In place and without `%`, which
    numpy does not vectorise: three times as fast.
    """
    b = b.astype(np.int64)
    count = np.full_like(b, n)
    total = np.zeros_like(b)
    quotient, product = np.empty_like(b), np.empty_like(b)

    def divide(x: np.ndarray) -> None:
        """Leaves x mod m in x and x // m in quotient."""
        np.floor_divide(x, m, out=quotient)
        np.multiply(quotient, m, out=product)
        np.subtract(x, product, out=x)

    while count.any():
        divide(b)
        quotient *= count
        total += quotient
        if a >= m:
            np.subtract(count, 1, out=product)
            product *= count
            product >>= 1
            product *= a // m
            total += product
        a %= m
        count *= a
        b += count
        divide(b)
        count, quotient = quotient, count
        m, a = a, m
    return total


def count_earlier_equal(groups: np.ndarray) -> np.ndarray:
    """How many elements of each row before an element are equal to it; `groups` is [rows, elements], from 0 on."""
    small = groups.astype(np.int16) if groups.max(initial=0) < 2**15 else groups  # sorted by radix
    order = np.argsort(small, axis=1, kind="stable")
    ordered = np.take_along_axis(small, order, 1)
    at = np.arange(groups.shape[1])
    begins = np.zeros(groups.shape, np.int64)
    np.copyto(begins[:, 1:], at[1:], where=ordered[:, 1:] != ordered[:, :-1])
    found = np.empty(groups.shape, np.int64)
    np.put_along_axis(found, order, at - np.maximum.accumulate(begins, axis=1), 1)
    return found


class Cycle:
    """Slots of every lane: slot q of lane i goes to the source whose interval holds (q g + i C / L) mod C.

    C is the sum of the integer weights, each source owns an interval as long as its weight, and the stride g is next to
    C / golden ratio and coprime to C: each lane deals exactly `weight` slots to a source in any C successive ones, and
    the lanes, each in another phase, do so together in every step.
    """

    def __init__(self, weights: Sequence[int], lanes: int) -> None:
        divisor = gcd(*weights)
        self.weights = np.array([weight // divisor for weight in weights], np.int64)
        self.edges = np.concatenate([[0], np.cumsum(self.weights)])
        self.length = int(self.edges[-1])
        self.lanes = lanes
        self.stride = (self.length * GOLDEN_RATIO_64) >> 64
        while gcd(self.stride, self.length) != 1:
            self.stride += 1

    def sources(self, lane: np.ndarray, slot: np.ndarray) -> np.ndarray:
        """Source of each slot; `lane` and `slot` broadcast. A source of weight 0 gets none."""
        where = (slot % self.length * self.stride + self._phase(lane)) % self.length
        return np.searchsorted(self.edges, where, "right") - 1

    def consumed(self, lane: np.ndarray, slots: int) -> np.ndarray:
        """Slots that each source gets in the first `slots` of each lane: int64 [sources, lanes], without counting."""
        cycles, rest = divmod(slots, self.length)
        phase = self._phase(lane)
        inner = self.edges[1:-1, None]
        points = floor_sums(
            rest, self.length, self.stride, np.concatenate([phase[None], phase + self.length - inner])
        )
        below = points[0] - points[1:] + rest
        ends = np.zeros((1, lane.size), np.int64)
        return np.diff(np.concatenate([ends, below, ends + rest]), axis=0) + cycles * self.weights[:, None]

    def _phase(self, lane: np.ndarray) -> np.ndarray:
        return lane * self.length // self.lanes
