"""From tensors that are decided to a plan: jobs in their places, files, companions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from pretrain.merge.merge_plan import Method, Options, Plan, TensorJob, Term, Why
from pretrain.merge.planning.output_layout import lay_out
from pretrain.weights.companions import with_dtype
from pretrain.weights.dtypes import TensorInfo
from pretrain.weights.source import WeightSource

LISTED = 200


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output; `info`: dtype and shape as it is written."""

    name: str
    info: TensorInfo
    why: Why
    blend: Blend


def assemble(
    decided: Sequence[PlannedTensor],
    sources: Sequence[WeightSource],
    main: int,
    max_shard_size: int,
    *,
    inputs: int,
    method: str,
    weights: Sequence[float],
    request: dict[str, Any],
    dtype: str | None,
    frozen: Path | None = None,
    left_out: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Plan:
    """Put tensors into files in the order of `decided`.

    main:  the source whose config, tokenizer and ties the output has.
    dtype: what config.json says the output is; None: as it is there.
    """
    if (config_error := sources[main].config_error) is not None:
        raise UserError(f"{config_error}; the output has the config of {sources[main].address}")
    laid = lay_out({one.name: one.info for one in decided}, max_shard_size)
    jobs = []
    named = {one.name: one for one in decided}
    for name, (
        file,
        offset,
    ) in laid.places.items():  # as the headers list them: of two at one place one is empty
        one = named[name]
        dtypes = [sources[term.source].info(term.name)[0] for term in one.blend.terms]
        base = one.blend.base
        based = sources[base.source].info(base.name)[0] if base is not None else None
        blend = resolve(one.blend, dtypes, based, one.info[0])
        jobs.append(
            TensorJob(
                one.name,
                *one.info,
                blend.method,
                blend.terms,
                blend.base,
                blend.options,
                one.why,
                file,
                offset,
            )
        )
    present = {one.name for one in decided}
    if frozen is not None:
        present.update(name for source in sources for name in source.frozen)
    return Plan(
        addresses=tuple(source.address for source in sources),
        inputs=inputs,
        method=method,
        weights=tuple(float(weight) for weight in weights),
        request=request,
        jobs=tuple(jobs),
        files=laid.files,
        index=laid.index,
        frozen=frozen,
        left_out=tuple(left_out),
        tied={n: to for n, to in sources[main].tied.items() if to in present and n not in present},
        companions=with_dtype(sources[main].companions, dtype),
        stage_dir=sources[main].located.stage_dir,
        notes=(*notes, *sources[main].notes),
        rows_digests=tuple(source.rows_digest for source in sources),
    )


def refusal(names: str, problems: Sequence[str], advice: str) -> UserError:
    """Every mismatch at once."""
    listed = "".join(f"\n  {problem}" for problem in problems[:LISTED])
    more = len(problems) - LISTED
    return UserError(
        f"cannot merge {names}, {len(problems)} mismatch{'es' if len(problems) > 1 else ''}:{listed}"
        + (f"\n  ... and {more} more" if more > 0 else "")
        + f"\n{advice}"
    )


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
