"""Assembles planned tensors into a `Plan`: jobs at offsets in output files. Drops zero weights, detects copies."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from pretrain.merge.merge_plan import Method, Options, Plan, TensorJob, Term, Treatment
from pretrain.merge.planning.output_layout import Layout, lay_out
from pretrain.merge.planning.settings import export_notes
from pretrain.merge.vocabulary.align import tokens_without_rows
from pretrain.weights.companions import with_dtype
from pretrain.weights.dtypes import FLOATS, TensorInfo, elements
from pretrain.weights.source import WeightSource

MAX_LISTED = 10  # groups of mismatches in an error message
NUMBER = re.compile(r"(?<=\.)\d+(?=[.:])")  # of a layer or an expert in a name


@dataclass(frozen=True)
class Blend:
    """How the terms of a tensor are combined. The weights are resolved; some may be 0."""

    method: Method
    terms: tuple[Term, ...]
    base: Term | None = None
    options: Options = ()


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output. `info`: its dtype and shape in the output; `treatment`: see TensorJob."""

    name: str
    info: TensorInfo
    treatment: Treatment
    blend: Blend


def assemble(
    planned: Sequence[PlannedTensor],
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
    """Plan the tensors `planned`, which fill the output files in this order. The other arguments are fields of Plan.

    main:  index of the source whose config, tokenizer and tied names the output has.
    dtype: dtype to write into config.json; None: that of most elements, so that a library does not round them.
    Raises UserError if the output cannot use the config of `main`.
    """
    if (config_error := sources[main].config_error) is not None:
        raise UserError(f"{config_error}; the output needs the config of {sources[main].address}")
    infos = {tensor.name: tensor.info for tensor in planned}
    beyond = tokens_without_rows(sources[main].companions, infos, sources[main].address)
    if beyond is not None and sources[main].rows_digest:  # a vocabulary rule chose rows and tokens
        raise UserError(f"{sources[main].address}: {beyond}; choose another vocabulary rule")
    layout = lay_out(infos, max_shard_size)
    jobs = _jobs(planned, sources, layout)
    present = {tensor.name for tensor in planned}
    if frozen is not None:
        present.update(name for source in sources for name in source.frozen)
    return Plan(
        addresses=tuple(source.address for source in sources),
        inputs=inputs,
        method=method,
        weights=tuple(float(weight) for weight in weights),
        request=request,
        jobs=jobs,
        files=layout.files,
        index=layout.index,
        frozen=frozen,
        left_out=tuple(left_out),
        tied={n: to for n, to in sources[main].tied.items() if to in present and n not in present},
        companions=with_dtype(
            sources[main].companions, dtype if dtype is not None else _most_common_float(infos)
        ),
        stage_dir=sources[main].located.stage_dir,
        notes=(
            *notes,
            *([beyond] if beyond is not None else []),
            *(note for source in sources for note in source.reading),
            *sources[main].notes,
            *export_notes(sources[main]),
        ),
        rows_digests=tuple(
            source.rows_digest + (f" key {source.key}" if source.key else "") for source in sources
        ),
    )


def _most_common_float(infos: Mapping[str, TensorInfo]) -> str | None:
    """The floating-point dtype of most elements; None without floats."""
    counts: Counter[str] = Counter()
    for dtype, shape in infos.values():
        if dtype in FLOATS:
            counts[dtype] += elements(shape)
    return max(counts, key=lambda dtype: counts[dtype]) if counts else None


def _jobs(
    planned: Sequence[PlannedTensor], sources: Sequence[WeightSource], layout: Layout
) -> tuple[TensorJob, ...]:
    """The jobs in the order of the file headers, where an empty tensor may share its offset with the next one."""
    jobs = []
    by_name = {tensor.name: tensor for tensor in planned}
    for name, (file, offset) in layout.places.items():
        tensor = by_name[name]
        dtypes = [sources[term.source].info(term.name)[0] for term in tensor.blend.terms]
        base = tensor.blend.base
        base_dtype = sources[base.source].info(base.name)[0] if base is not None else None
        blend = simplify(tensor.blend, dtypes, base_dtype, tensor.info[0])
        jobs.append(
            TensorJob(
                name,
                *tensor.info,
                blend.method,
                blend.terms,
                blend.base,
                blend.options,
                tensor.treatment,
                file,
                offset,
            )
        )
    return tuple(jobs)


def mismatch_error(names: str, problems: Sequence[str], advice: str) -> UserError:
    """The UserError that lists the mismatches of the inputs `names`: at most MAX_LISTED groups of them.

    Mismatches that differ only in the numbers of layers are one group.
    """
    groups: dict[str, list[str]] = {}
    for problem in problems:
        groups.setdefault(NUMBER.sub("*", problem), []).append(problem)
    shown = list(groups.items())[:MAX_LISTED]
    lines = [same[0] if len(same) == 1 else f"{pattern} ({len(same)} tensors)" for pattern, same in shown]
    listed = "".join(f"\n  {line}" for line in lines)
    unlisted = len(problems) - sum(len(same) for _, same in shown)
    return UserError(
        f"cannot merge {names}, {len(problems)} mismatch{'es' if len(problems) > 1 else ''}:{listed}"
        + (f"\n  ... and {unlisted} more" if unlisted > 0 else "")
        + f"\n{advice}"
    )


def simplify(blend: Blend, dtypes: Sequence[str], base: str | None, out: str) -> Blend:
    """Simplify a blend to one with the same result and fewer reads.

    Terms of weight 0 are dropped, so that their infinities and NaNs do not reach the result. One tensor with weight 1,
    and a base without terms, become a copy if the dtypes agree, else a conversion (linear, weight 1). For methods
    without sign election, `normalize` divides the weights by their sum here.

    dtypes: of the terms.
    base:   dtype of the base.
    out:    dtype of the output.
    """
    options = dict(blend.options)
    if blend.method in ("task_arithmetic", "dare_linear"):
        terms = blend.terms
        total = math.fsum(term.weight for term in terms)
        if options.pop("normalize", False) and abs(total) >= 1e-8:  # the threshold of mergekit
            terms = tuple(replace(term, weight=term.weight / total) for term in terms)
        blend = replace(blend, terms=terms, options=tuple(options.items()))
    kept = [(term, dtype) for term, dtype in zip(blend.terms, dtypes, strict=True) if term.weight != 0]
    if blend.base is None and not kept:  # all weights are 0: keep one term, so that the result is zeros
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
