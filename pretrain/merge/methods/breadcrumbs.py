"""Model Breadcrumbs (arXiv 2312.06795): of each difference neither the largest entries stay nor the smallest."""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.merge.merge_plan import Term
from pretrain.merge.methods import sparsify
from pretrain.merge.methods.blocks import Workers
from pretrain.merge.methods.task_vectors import NOTHING, Cut
from pretrain.weights.dtypes import Kind


def bands(
    terms: Sequence[Term], base: Term, gamma: float, kind: Kind, count: int, workers: Workers
) -> list[tuple[Cut | None, Cut | None]]:
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
