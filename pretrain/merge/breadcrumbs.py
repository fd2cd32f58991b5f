"""Model Breadcrumbs (arXiv 2312.06795): of each difference neither the largest entries stay nor the smallest."""

from __future__ import annotations

from dataclasses import replace

from pretrain.merge import ties
from pretrain.merge.blocks import Workers
from pretrain.merge.kernels import Kind
from pretrain.merge.parts import NOTHING, Cut
from pretrain.merge.plan import Term


def band(
    term: Term, base: Term, gamma: float, kind: Kind, count: int, workers: Workers
) -> tuple[Cut | None, Cut | None]:
    """What stays of x - base, and what of that goes as too large (None: all, and nothing): int(density * count) entries
    below the int(gamma * count) largest, of equal ones the first. As in mergekit, fewer of the largest go where the
    density asks for more than is left."""
    if term.density >= 1:
        return None, None
    stay, top = int(term.density * count), int(gamma * count)
    if stay <= 0:
        return NOTHING, None
    outer = min(count, stay + top)

    def largest(wanted: int) -> Cut | None:
        exact = replace(term, density=(wanted + 0.5) / count)  # int() of its product is `wanted`
        return ties.cut(exact, base, kind, count, workers)

    return largest(outer) if outer < count else None, largest(outer - stay) if outer > stay else None
