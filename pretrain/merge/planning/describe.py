"""A plan as text lines and as JSON, and its cost in bytes, memory and time."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.merge.merge_plan import Option, Plan, TensorJob, letter
from pretrain.weights.dtypes import DTYPES, ELEMENTS_PER_BLOCK, elements
from pretrain.weights.folder import FROZEN
from pretrain.weights.source import WeightSource

# Method -> formula of the output.
THETA = {
    "linear": "sum of weight x input",
    "slerp": "sum of factor x input: spherical interpolation, t is the weight of the second input",
    "passthrough": "input, times its scale",
    "task_arithmetic": "base + lambda x sum of weight x (input - base)",
    "ties": "base + lambda x majority-sign sum of weight x trimmed (input - base) (arXiv 2306.01708)",
    "dare_linear": "base + lambda x sum of weight x (input - base) after random drop (arXiv 2311.03099)",
    "dare_ties": "base + lambda x majority-sign sum of weight x (input - base) after random drop (arXiv 2311.03099)",
    "breadcrumbs": "base + lambda x sum of weight x middle entries of (input - base) (arXiv 2312.06795)",
    "breadcrumbs_ties": "base + lambda x majority-sign sum of weight x middle entries of (input - base)"
    " (arXiv 2312.06795)",
    "nuslerp": "sum of factor x input; with a base: base + sum of factor x (input - base)",
    "multislerp": "sum of factor x input; with a base: base + sum of factor x (input - base)",
    "karcher": "sum of factor x input: Karcher mean (arXiv 2603.04972)",
    "sce": "base + majority-sign mean of selected (input - base), weighed by their mean squares (arXiv 2408.07990)",
    "model_stock": "base + t x mean of (input - base), t by their angles (arXiv 2403.19522)",
}
ROUNDING = "each product rounded, added in this order, rounded once to the output type"
BYTES_PER_SECOND = 1e9  # assumed by the estimate of the time: bytes read, combined and written per second
BASE_MEMORY = 32e6  # bytes of the process with numpy before it merges, measured
# Methods of pretrain.merge.methods.gram, which first compute norms and angles.
GRAM_METHODS = ("slerp", "nuslerp", "multislerp", "karcher", "model_stock")
# Passes of a method over its inputs, if more than one.
PASSES = {**dict.fromkeys(GRAM_METHODS, 2), "ties": 3, "breadcrumbs": 4, "breadcrumbs_ties": 4, "sce": 6}


def lines(plan: Plan) -> list[str]:
    """The plan as text: one line per source and per tensor with its resolved weights, notes, and the summary."""
    bases = {job.base.source for job in plan.jobs if job.base is not None}
    rows = [
        f"{letter(i)}  {address}{'  (base)' if i in bases else ''}"
        for i, address in enumerate(plan.addresses)
    ]
    rows.append(f"theta = {formula(plan)}")
    rows += [f"  {job.name}  {job.dtype} {list(job.shape)}  {blend_text(plan, job)}" for job in plan.jobs]
    if plan.frozen is not None:
        rows.append(f"  {FROZEN}: shared with {plan.frozen}")
    rows += [f"  left out: {name}" for name in plan.left_out]
    rows += [f"  {name}: tied to {to}" for name, to in plan.tied.items()]
    rows += [f"note: {note}" for note in plan.notes]
    rows.append(summary(plan))
    return rows


def summary(plan: Plan) -> str:
    """Counts of mixed, copied (by reason) and left-out tensors, and the bytes written."""
    treatments = Counter(job.treatment for job in plan.jobs)
    mixed = treatments.pop("mixed", 0)
    listed = (
        [*treatments]
        if len(treatments) == 1
        else [f"{count} {reason}" for reason, count in treatments.items()]
    )
    reasons = f" ({', '.join(listed)})" if treatments else ""
    left = f", {len(plan.left_out)} left out" if plan.left_out else ""
    name = plan.files[0].name if len(plan.files) == 1 else f"{len(plan.files)} files"
    return f"{mixed} tensors mixed, {treatments.total()} copied{reasons}{left}, {plan.size:,} bytes in {name}"


def formula(plan: Plan, addresses: bool = False) -> str:
    """The merge in one line, without its rules; inputs by letter or by address."""
    if not plan.weights:
        return f"{plan.method}, tensor by tensor as defined in {plan.request['file']}"
    names = plan.addresses if addresses else tuple(map(letter, range(len(plan.weights))))
    terms = " + ".join(f"{w:g} x {name}" for w, name in zip(plan.weights, names, strict=False))
    return terms if plan.method == "linear" else f"{plan.method}({terms})"


def blend_text(plan: Plan, job: TensorJob) -> str:
    """The formula of one tensor."""
    marks = [letter(term.source) for term in job.terms]
    renamed = f" {job.terms[0].name}" if job.terms[0].name != job.name else ""
    if job.copy:
        return (
            f"copy of {marks[0]}{renamed} ({job.treatment})"
            if job.treatment != "mixed"
            else f"1 {marks[0]}{renamed}"
        )
    terms = [
        f"{term.weight:g} {m}" + (f" (density {term.density:g})" if term.density != 1 else "")
        for m, term in zip(marks, job.terms, strict=True)
    ]
    joined = " + ".join(terms) + renamed
    if job.method == "linear":
        return joined
    options = "".join(f", {name} {_option(value)}" for name, value in job.options if name != "t")
    base = f", base {letter(job.base.source)}" if job.base is not None else ""
    return f"{job.method}({joined}{base}{options})"


def _option(value: Option) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as a JSON object."""
    return {
        "inputs": [
            {"address": address, "weight": plan.weights[i] if plan.weights else None}
            for i, address in enumerate(plan.addresses[: plan.inputs])
        ],
        "others": list(plan.addresses[plan.inputs :]),
        "method": plan.method,
        "asked": plan.request,
        "tensors": [
            {
                "name": job.name,
                "dtype": job.dtype,
                "shape": list(job.shape),
                "method": job.method,
                "terms": [[t.source, t.name, t.weight, t.density] for t in job.terms],
                "base": [job.base.source, job.base.name] if job.base is not None else None,
                "options": dict(job.options),
                "why": job.treatment,
                "file": plan.files[job.file].name,
            }
            for job in plan.jobs
        ],
        "files": {file.name: file.size for file in plan.files},
        "left_out": list(plan.left_out),
        "tied": plan.tied,
        "notes": list(plan.notes),
        "bytes_written": plan.size,
    }


@dataclass(frozen=True)
class Cost:
    """Bytes read (each input once), bytes written, peak memory in bytes, and seconds at BYTES_PER_SECOND."""

    read: int
    written: int
    memory: int
    seconds: float

    def lines(self) -> list[str]:
        """The cost as text."""
        time = f"{self.seconds:.1f} s" if self.seconds >= 0.1 else "less than 0.1 s"
        return [
            f"reads {self.read:,} bytes, writes {self.written:,}; takes about {self.memory / 1e6:.0f} MB of memory "
            f"and {time} at {BYTES_PER_SECOND / 1e9:g} GB/s"
        ]


def cost(plan: Plan, sources: Sequence[WeightSource], threads: int | None = None) -> Cost:
    """Estimate the cost of a plan without reading data. Memory excludes the page cache of mapped files."""
    reads = {job.name: _read(job, sources) for job in plan.jobs}
    work = sum(PASSES.get(job.method, 1) * reads[job.name] for job in plan.jobs)
    arrays = max((len(job.terms) + (16 if job.method == "ties" else 6) for job in plan.jobs), default=0)
    headers = sum(len(file.header) for file in plan.files)
    memory = BASE_MEMORY + (threads or processors()) * ELEMENTS_PER_BLOCK * 8 * arrays + 20 * headers
    return Cost(sum(reads.values()), plan.size, int(memory), (work + plan.size) / BYTES_PER_SECOND)


def processors() -> int:
    """Number of threads of a merge, the same as in pretrain.merge.methods.blocks."""
    return min(4, len(os.sched_getaffinity(0)))


def _read(job: TensorJob, sources: Sequence[WeightSource]) -> int:
    terms = [*job.terms, *([job.base] if job.base is not None else [])]
    infos = {(term.source, term.name): sources[term.source].info(term.name) for term in terms}
    return sum(elements(shape) * DTYPES[dtype].itemsize for dtype, shape in infos.values())
