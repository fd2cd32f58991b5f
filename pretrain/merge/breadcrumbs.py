"""Model Breadcrumbs (arXiv 2312.06795): of each difference neither the largest entries stay nor the smallest."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pretrain.merge import ties
from pretrain.merge.blocks import Block, Workers
from pretrain.merge.kernels import Kind
from pretrain.merge.plan import Term


@dataclass(frozen=True)
class Band:
    """What stays: what `outer` keeps (None: all) and `inner` does not (None: nothing is too large); or nothing."""

    outer: ties.Cut | None
    inner: ties.Cut | None
    empty: bool = False


def band(term: Term, base: Term, gamma: float, kind: Kind, count: int, workers: Workers) -> Band | None:
    """The band that leaves int(density * count) entries below the int(gamma * count) largest, of equal ones the first;
    None for all. As in mergekit, fewer of the largest go where the density asks for more than is left."""
    if term.density >= 1:
        return None
    stay, top = int(term.density * count), int(gamma * count)
    if stay <= 0:
        return Band(None, None, empty=True)
    outer = min(count, stay + top)

    def largest(wanted: int) -> ties.Cut | None:
        exact = replace(term, density=(wanted + 0.5) / count)  # int() of its product is `wanted`
        return ties.cut(exact, base, kind, count, workers)

    return Band(largest(outer) if outer < count else None, largest(outer - stay) if outer > stay else None)


def trim(difference: np.ndarray, kept: Band | None, block: Block) -> None:
    """Set what does not stay to zero."""
    if kept is None:
        return
    if kept.empty:
        difference[:] = 0
        return
    if kept.inner is not None:
        large = block.array("large", difference.dtype)
        np.copyto(large, difference)
        ties.trim(large, kept.inner, block)
    ties.trim(difference, kept.outer, block)
    if kept.inner is not None:
        # What the inner cut kept is the same number in both.
        np.subtract(difference, large, out=difference)
