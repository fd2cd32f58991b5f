"""What merge.json says beyond figures: every job, so that anyone can compute it again, and a seal over the whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import xxhash

from data_pipeline.errors import UserError
from pretrain.merge.merge_plan import Plan, TensorJob, Term

SEAL = "seal"


def jobs_plain(plan: Plan) -> list[dict[str, Any]]:
    """The plan's jobs as JSON holds them; numbers come back as they were."""
    return [_plain(plan, job) for job in plan.jobs]


def jobs_of(record: Mapping[str, Any]) -> list[tuple[str, TensorJob]]:
    """(file, job) of a record's every tensor. Raises UserError where a job is not as it was written."""
    try:
        return [(str(entry["file"]), _job(entry)) for entry in record["jobs"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"merge.json: its jobs are not what a merge writes ({error!r})") from None


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with a digest of all the rest of it."""
    rest = {key: value for key, value in record.items() if key != SEAL}
    return {**rest, SEAL: _digest(rest)}


def is_sealed(record: Mapping[str, Any]) -> bool:
    """Whether the record is as it was written."""
    return record.get(SEAL) == sealed(record)[SEAL]


def _digest(record: Mapping[str, Any]) -> str:
    # through JSON and back: tuples are lists there, and keys are text
    text = json.dumps(json.loads(json.dumps(record)), sort_keys=True, separators=(",", ":"))
    return xxhash.xxh64(text.encode()).hexdigest()


def _plain(plan: Plan, job: TensorJob) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": job.name,
        "dtype": job.dtype,
        "shape": list(job.shape),
        "method": job.method,
        "terms": [_plain_term(job, term) for term in job.terms],
    }
    if job.base is not None:
        found["base"] = _plain_term(job, job.base)
    if job.options:
        found["options"] = dict(job.options)
    return {**found, "why": job.why, "file": plan.files[job.file].name, "offset": job.offset}


def _plain_term(job: TensorJob, term: Term) -> dict[str, Any]:
    found: dict[str, Any] = {"source": term.source, "weight": term.weight}
    if term.name != job.name:
        found["name"] = term.name
    if term.density != 1:
        found["density"] = term.density
    return found


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
        terms=tuple(term(one) for one in entry["terms"]),
        base=term(entry["base"]) if "base" in entry else None,
        options=tuple(sorted(entry.get("options", {}).items())),
        why=entry["why"],
        file=0,
        offset=int(entry["offset"]),
    )


RECORD = "merge.json"
