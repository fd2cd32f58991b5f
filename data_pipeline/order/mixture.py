"""Assigns each row of a lane to a source so that every source gets its weight, without a loop over earlier rows.

A slot is one row of one lane. The slots of each source before any step are counted in closed form, so a run can start
at any step.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import numpy as np

from data_pipeline.hashing import GOLDEN_RATIO_64


def floor_sums(n: int, m: int, a: int, b: np.ndarray) -> np.ndarray:
    """Sum over t in [0, n) of floor((a t + b) / m), exactly, for each element of `b`: int64 of its shape.

    Requires 0 <= a < m <= 2**31, n <= m and 0 <= b <= 2 m. Counts the lattice points under a line by Euclid's algorithm
    on (m, a) (Graham, Knuth, Patashnik, Concrete Mathematics, 3.5). All elements share its at most 44 steps. It works
    in place and avoids `%`, which numpy does not vectorise: three times as fast.
    """
    b = b.astype(np.int64)
    count = np.full_like(b, n)
    total = np.zeros_like(b)
    quotient, product = np.empty_like(b), np.empty_like(b)

    def divide(x: np.ndarray) -> None:
        """Write x mod m to x and x // m to quotient."""
        np.floor_divide(x, m, out=quotient)
        np.multiply(quotient, m, out=product)
        np.subtract(x, product, out=x)

    while count.any():
        divide(b)
        quotient *= count
        total += quotient
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
    """For each element, the number of equal elements before it in its row: int64 [rows, elements].

    `groups` is an integer array [rows, elements] of values of at least 0.
    """
    small = groups.astype(np.int16) if groups.max(initial=0) < 2**15 else groups  # numpy sorts int16 by radix
    order = np.argsort(small, kind="stable")
    ordered = np.take_along_axis(small, order, 1)
    at = np.arange(groups.shape[1])
    begins = np.zeros(groups.shape, np.int64)
    np.copyto(begins[:, 1:], at[1:], where=ordered[:, 1:] != ordered[:, :-1])
    counts = np.empty(groups.shape, np.int64)
    np.put_along_axis(counts, order, at - np.maximum.accumulate(begins, axis=1), 1)
    return counts


class Cycle:
    """Assignment of slots to sources, repeated every C slots of a lane.

    C is the sum of the integer weights, L the number of lanes, i a lane, and q the number of a slot in its lane. The
    stride g is the first number from floor(C / golden ratio) on that is coprime to C. Each source has an interval of
    [0, C) whose length is its weight.

    Slot q of lane i belongs to the source whose interval contains (q g + floor(i C / L)) mod C. Example: weights 3 and
    1 for the sources a and b give C = 4, g = 3, a = [0, 3), b = [3, 4); lane 0 has the positions 0, 3, 2, 1, so its
    slots belong to a, b, a, a.

    Any C successive slots of a lane contain exactly `weight` slots of each source, spread evenly. The lanes start at
    different positions, so each step is close to the weights too.
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
        """Number of the source of each slot; `lane` and `slot` broadcast. A source of weight 0 gets no slot."""
        position = (slot % self.length * self.stride + self._phase(lane)) % self.length
        return np.searchsorted(self.edges, position, "right") - 1

    def consumed(self, lane: np.ndarray, slots: int) -> np.ndarray:
        """Slots of each source among the first `slots` of each lane: int64 [sources, lanes], in closed form."""
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
