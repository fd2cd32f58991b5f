"""merge.json: jobs that come back exactly, errors for malformed ones, and a seal that notices any change."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from typing import Any

import pytest

from data_pipeline.errors import UserError
from pretrain.merge.merge_plan import OutputFile, Plan, TensorJob, Term
from pretrain.merge.output.record import is_sealed, jobs_of, jobs_plain, sealed

FILES = (OutputFile("model-1.safetensors", b"h", 10), OutputFile("model-2.safetensors", b"h", 10))
THIRD = 1 / 3
JOBS = (
    TensorJob("a", "F32", (2, 3), "linear", (Term(0, "a", THIRD), Term(1, "a", 1 - THIRD)), None, (), "mixed", 0, 8),
    TensorJob("b", "I64", (), "copy", (Term(1, "other.b"),), None, (), "integer", 1, 32),
    TensorJob(
        "c", "BF16", (0, 7), "ties",
        (Term(0, "c", 1e-300, 0.1), Term(2, "renamed", math.pi, 1.0)), Term(3, "base.c", 1.0, THIRD),
        (("lambda", 0.7), ("normalize", False), ("seed", 7), ("t", "x")), "mixed", 1, 2**40,
    ),
)  # fmt: skip


def plan(jobs: tuple[TensorJob, ...] = JOBS) -> Plan:
    return Plan(
        method="linear", addresses=("x", "y"), inputs=2, weights=(0.5, 0.5), request={}, jobs=jobs, files=FILES,
        index=None, frozen=None, left_out=(), tied={}, companions={}, stage_dir=None, notes=(), rows_digests=(),
    )  # fmt: skip


def stored() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(json.dumps(jobs_plain(plan())))
    return found


def test_jobs_come_back_exactly_from_the_file() -> None:
    wanted = [(FILES[job.file].name, replace(job, file=0)) for job in JOBS]
    assert jobs_of({"jobs": stored()}) == wanted
    read = jobs_of({"jobs": stored()})
    assert [type(value) for _, value in read[2][1].options] == [float, bool, int, str]
    assert all(type(term.weight) is float for _, job in read for term in job.reads)


def test_what_is_usual_is_left_out_of_the_file() -> None:
    """A model has thousands of tensors; `name` and `density` of a term are written where they say something."""
    first, second, third = stored()
    assert first["terms"] == [{"source": 0, "weight": THIRD}, {"source": 1, "weight": 1 - THIRD}]
    assert second["terms"] == [{"source": 1, "weight": 1.0, "name": "other.b"}]
    assert {"base", "options"} & set(first) == set()
    assert third["base"] == {"source": 3, "weight": 1.0, "name": "base.c", "density": THIRD}
    assert [job["file"] for job in (first, second, third)] == [FILES[job.file].name for job in JOBS]
    assert [job["why"] for job in (first, second, third)] == ["mixed", "integer", "mixed"]


@pytest.mark.parametrize("key", ["name", "dtype", "shape", "method", "terms", "why", "file", "offset"])
def test_a_job_that_lacks_a_field_is_refused(key: str) -> None:
    jobs = stored()
    del jobs[1][key]
    with pytest.raises(UserError, match=rf"merge\.json: the list of jobs is malformed .*{key}"):
        jobs_of({"jobs": jobs})


@pytest.mark.parametrize(
    ("key", "value"),
    [("shape", 3), ("shape", ["x"]), ("terms", [{}]), ("terms", [{"source": 0}]), ("terms", [{"weight": 1}]),
     ("terms", [[0, 1]]), ("offset", "x"), ("offset", None), ("options", 3), ("base", {}),
     ("terms", [{"source": "x", "weight": 1}]), ("terms", [{"source": 0, "weight": "x"}])],
)  # fmt: skip
def test_a_job_with_a_wrong_value_is_refused(key: str, value: Any) -> None:
    jobs = stored()
    jobs[2][key] = value
    with pytest.raises(UserError, match=r"merge\.json: the list of jobs is malformed"):
        jobs_of({"jobs": jobs})


@pytest.mark.parametrize("record", [{}, {"jobs": None}, {"jobs": [3]}])
def test_a_record_without_jobs_is_refused(record: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="the list of jobs is malformed"):
        jobs_of(record)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a tree."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([path] if path else []), *(found for key, one in inner for found in places(one, (*path, key)))]


def test_the_seal_survives_the_file_and_notices_every_change() -> None:
    made = {"plan": "k", "weights": (0.1, 2), "tied": {"a": None}, 7: True, "jobs": stored()}
    record = sealed(made)
    assert is_sealed(record)
    assert "seal" not in made
    read = json.loads(json.dumps(record))
    assert is_sealed(read)
    assert is_sealed(dict(reversed(read.items())))  # the order of keys is not content
    assert sealed(read) == read
    assert not is_sealed({key: value for key, value in read.items() if key != "seal"})
    assert not is_sealed({**read, "more": 1})
    for path in places(read):
        for change in ("other", "gone"):
            changed = copy.deepcopy(read)
            node = changed
            for key in path[:-1]:
                node = node[key]
            if change == "gone":
                del node[path[-1]]
            else:
                node[path[-1]] = "changed"
            assert not is_sealed(changed), path
