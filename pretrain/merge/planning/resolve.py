"""From what is asked of one tensor to the job that the writer does: weights of zero dropped, copies recognised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pretrain.merge.merge_plan import Method, Options, Term


@dataclass(frozen=True)
class Blend:
    """How one tensor is combined. Terms have resolved weights; some may be 0."""

    method: Method
    terms: tuple[Term, ...]
    base: Term | None = None
    options: Options = ()


def resolve(blend: Blend, dtypes: Sequence[str], base: str | None, out: str) -> Blend:
    """The same result with fewer reads. `dtypes`: of the terms; `base`: the base's; `out`: the output's.

    Terms of weight 0 go: what they hold (an infinity, a NaN) has no part in the result. What is then one tensor
    whole is a copy, where it has the output's dtype, else a conversion (linear, weight 1). Where no signs are
    compared, `normalize` divides the weights by their sum here.
    """
    options = dict(blend.options)
    if blend.method in ("task_arithmetic", "dare_linear"):
        terms = blend.terms
        total = math.fsum(term.weight for term in terms)
        if options.pop("normalize", False) and abs(total) >= 1e-8:  # mergekit's bound
            terms = tuple(replace(term, weight=term.weight / total) for term in terms)
        blend = replace(blend, terms=terms, options=tuple(options.items()))
    kept = [(term, dtype) for term, dtype in zip(blend.terms, dtypes, strict=True) if term.weight != 0]
    if blend.base is None and not kept:  # nothing times a tensor is asked for
        kept = [(blend.terms[0], dtypes[0])]
    terms = tuple(term for term, _ in kept)
    if blend.method in ("linear", "slerp") and len(kept) == 1 and terms[0].weight == 1:
        return _whole(terms[0], kept[0][1], out)
    if blend.method == "slerp" and len(kept) == 1:
        return Blend("linear", terms)
    if blend.base is not None and base is not None and (not terms or options.get("lambda", 1.0) == 0):
        return _whole(blend.base, base, out)
    return Blend(blend.method, terms, blend.base, tuple(sorted(blend.options)))


def _whole(term: Term, dtype: str, out: str) -> Blend:
    return Blend("copy" if dtype == out else "linear", (Term(term.source, term.name),))
