"""How far two tensors are from each other: sums in fp64 over blocks, in constant memory, the same on any threads."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from pretrain.merge.merge_plan import Term
from pretrain.merge.methods.blocks import Block, Workers
from pretrain.weights.dtypes import FLOATS, elements, exact_sum


@dataclass(frozen=True)
class Distance:
    """Sums over the elements of one tensor pair, or of several; `a` is the first model's, `b` the second's.

    count:      elements.
    compared:   those that are finite in both; all that follows but `equal` is of these.
    squares:    sum of (b - a)^2.
    squares_a, squares_b, products: sums of a^2, b^2, a b.
    max_abs:    largest |b - a|.
    same_sign:  elements whose sign is the same; 0 has a sign of its own.
    equal:      elements with the same value, infinities included.
    """

    count: int = 0
    compared: int = 0
    squares: float = 0.0
    squares_a: float = 0.0
    squares_b: float = 0.0
    products: float = 0.0
    max_abs: float = 0.0
    same_sign: int = 0
    equal: int = 0

    @property
    def relative(self) -> float:
        """|b - a| / |a| in the L2 norm; 0 where nothing differs, infinite where only `a` is 0."""
        if self.squares == 0:
            return 0.0
        return math.sqrt(self.squares / self.squares_a) if self.squares_a else math.inf

    @property
    def cosine(self) -> float | None:
        """None where one of both is 0."""
        norm = math.sqrt(self.squares_a) * math.sqrt(self.squares_b)
        return min(1.0, max(-1.0, self.products / norm)) if 0 < norm < math.inf else None

    @property
    def sign_agreement(self) -> float:
        return self.same_sign / self.compared if self.compared else 1.0

    @property
    def equal_share(self) -> float:
        return self.equal / self.count if self.count else 1.0

    def plain(self) -> dict[str, Any]:
        """The figures as JSON holds them; null is infinite, or not defined."""
        return {
            "elements": self.count,
            "relative_l2": self.relative if math.isfinite(self.relative) else None,
            "cosine": self.cosine,
            "max_abs": self.max_abs,
            "sign_agreement": self.sign_agreement,
            "equal": self.equal_share,
            "not_finite": self.count - self.compared,
        }


def total(parts: Iterable[Distance]) -> Distance:
    """Of several parts as one, added without further rounding."""
    listed = list(parts)
    sums: dict[str, Any] = {}
    for field in fields(Distance):
        values = [getattr(part, field.name) for part in listed]
        if field.name == "max_abs":
            sums[field.name] = max(values, default=0.0)
        else:
            sums[field.name] = exact_sum(values) if isinstance(field.default, float) else sum(values)
    return Distance(**sums)


def distance(a: Term, b: Term, workers: Workers) -> Distance:
    """Between two tensors of the same shape, numbers of any dtype but 8-bit floats."""
    count = elements(workers.sources[a.source].info(a.name)[1])

    def work(start: int, stop: int) -> Distance:
        return total(_of(block, a, b) for block in workers.blocks(start, stop))

    return total(workers.over(work, count))


def _of(block: Block, a: Term, b: Term) -> Distance:
    one, two = _wide(block, a, "a"), _wide(block, b, "b")
    count, equal = len(one), int(np.count_nonzero(one == two))
    finite = np.isfinite(one) & np.isfinite(two)
    if not finite.all():
        one, two = one[finite], two[finite]
    gap = np.subtract(two, one, out=block.array("gap", np.float64)[: len(one)])
    same = ((one > 0) == (two > 0)) & ((one < 0) == (two < 0))
    return Distance(
        count,
        len(one),
        _dot(gap, gap),
        _dot(one, one),
        _dot(two, two),
        _dot(one, two),
        float(np.abs(gap, out=gap).max(initial=0.0)),
        int(np.count_nonzero(same)),
        equal,
    )


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    # BLAS would take threads of its own, and its sums would depend on their number
    return float(np.einsum("i,i->", a, b))


def _wide(block: Block, term: Term, use: str) -> np.ndarray:
    if block.sources[term.source].info(term.name)[0] in FLOATS:
        return block.wide(term, np.float64)
    out = block.array(use, np.float64)
    np.copyto(out, block.stored(term))
    return out
