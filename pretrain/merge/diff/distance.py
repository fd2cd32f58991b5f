"""Distance of two tensors in fp64 and constant memory.

Sums are computed per block and added exactly, so that the result does not depend on the number of threads.
"""

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
    """Sums over the elements of one or more pairs of tensors, `a` of the first model and `b` of the second.

    count:      number of elements.
    compared:   number of elements that are finite in both; the fields below, except `equal`, cover only these.
    squares:    sum of (b - a)^2.
    squares_a, squares_b, products: sums of a^2, b^2, a b.
    max_abs:    largest |b - a|.
    same_sign:  number of elements with the same sign, where 0 counts as a third sign.
    equal:      number of elements with the same value, infinities included.
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
        """|b - a| / |a| in the L2 norm; 0 if nothing differs, infinite if only `a` is 0."""
        if self.squares == 0:
            return 0.0
        return math.sqrt(self.squares / self.squares_a) if self.squares_a else math.inf

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between `a` and `b`; None if one of them is 0, or if a norm overflows fp64."""
        norm = math.sqrt(self.squares_a) * math.sqrt(self.squares_b)
        return min(1.0, max(-1.0, self.products / norm)) if 0 < norm < math.inf else None

    @property
    def sign_agreement(self) -> float:
        """Share of the compared elements with the same sign; 1 if there are none."""
        return self.same_sign / self.compared if self.compared else 1.0

    @property
    def equal_share(self) -> float:
        """Share of equal elements; 1 if there are none."""
        return self.equal / self.count if self.count else 1.0

    def plain(self) -> dict[str, Any]:
        """The measures as JSON data; None if a measure is infinite or undefined."""
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
    """The distance over several parts together; sums are added exactly and rounded once."""
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
    """The distance of two tensors of the same shape and of any dtypes except 8-bit floats."""
    count = elements(workers.sources[a.source].info(a.name)[1])

    def work(start: int, stop: int) -> Distance:
        return total(_block_distance(block, a, b) for block in workers.blocks(start, stop))

    return total(workers.map_spans(work, count))


def _block_distance(block: Block, a: Term, b: Term) -> Distance:
    x, y = _wide(block, a, "a"), _wide(block, b, "b")
    count, equal = len(x), int(np.count_nonzero(x == y))
    finite = np.isfinite(x) & np.isfinite(y)
    if not finite.all():
        x, y = x[finite], y[finite]
    difference = np.subtract(y, x, out=block.array("gap", np.float64)[: len(x)])
    same = ((x > 0) == (y > 0)) & ((x < 0) == (y < 0))
    return Distance(
        count,
        len(x),
        _dot(difference, difference),
        _dot(x, x),
        _dot(y, y),
        _dot(x, y),
        float(np.abs(difference, out=difference).max(initial=0.0)),
        int(np.count_nonzero(same)),
        equal,
    )


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    # not np.dot: BLAS starts threads of its own, and its sums depend on their number
    return float(np.einsum("i,i->", a, b))


def _wide(block: Block, term: Term, use: str) -> np.ndarray:
    """The elements of the term in the block as float64; `use` names the buffer for integers."""
    if block.sources[term.source].info(term.name)[0] in FLOATS:
        return block.wide(term, np.float64)
    out = block.array(use, np.float64)
    np.copyto(out, block.stored(term))
    return out
