"""merge.json: its file name, its jobs (enough to recompute a merge), and its seal (a digest of the content)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

from data_pipeline.errors import UserError
from pretrain.merge.merge_plan import Plan, TensorJob, Term

RECORD = "merge.json"
SEAL = "seal"


def jobs_plain(plan: Plan) -> list[dict[str, Any]]:
    """The plan's jobs as JSON values; `jobs_of` restores every number exactly."""
    return [_plain(plan, job) for job in plan.jobs]


def jobs_of(record: Mapping[str, Any]) -> list[tuple[str, TensorJob]]:
    """(file name, job) of every tensor of a record. Raises UserError if a job is malformed."""
    try:
        return [(str(entry["file"]), _job(entry)) for entry in record["jobs"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"merge.json: the list of jobs is malformed ({error!r})") from None


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with a `seal`: the digest of its other keys."""
    content = {key: value for key, value in record.items() if key != SEAL}
    return {**content, SEAL: _digest(content)}


def is_sealed(record: Mapping[str, Any]) -> bool:
    """True if the seal matches the content."""
    return record.get(SEAL) == sealed(record)[SEAL]


def _digest(record: Mapping[str, Any]) -> str:
    # a round trip through JSON turns tuples into lists and keys into text, as in the file
    text = json.dumps(json.loads(json.dumps(record)), sort_keys=True, separators=(",", ":"))
    return xxhash.xxh64(text.encode()).hexdigest()


def _plain(plan: Plan, job: TensorJob) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "name": job.name,
        "dtype": job.dtype,
        "shape": list(job.shape),
        "method": job.method,
        "terms": [_plain_term(job, term) for term in job.terms],
    }
    if job.base is not None:
        plain["base"] = _plain_term(job, job.base)
    if job.options:
        plain["options"] = dict(job.options)
    return {**plain, "why": job.treatment, "file": plan.files[job.file].name, "offset": job.offset}


def _plain_term(job: TensorJob, term: Term) -> dict[str, Any]:
    plain: dict[str, Any] = {"source": term.source, "weight": term.weight}
    if term.name != job.name:
        plain["name"] = term.name
    if term.density != 1:
        plain["density"] = term.density
    return plain


def _job(entry: Mapping[str, Any]) -> TensorJob:
    name = str(entry["name"])

    def term(plain: Mapping[str, Any]) -> Term:
        return Term(
            int(plain["source"]),
            str(plain.get("name", name)),
            float(plain["weight"]),
            float(plain.get("density", 1.0)),
        )

    return TensorJob(
        name=name,
        dtype=str(entry["dtype"]),
        shape=tuple(int(size) for size in entry["shape"]),
        method=entry["method"],
        terms=tuple(term(plain) for plain in entry["terms"]),
        base=term(entry["base"]) if "base" in entry else None,
        options=tuple(sorted(entry.get("options", {}).items())),
        treatment=entry["why"],
        file=0,
        offset=int(entry["offset"]),
    )
