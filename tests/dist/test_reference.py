"""Training runs against the reference trainer: losses, gradients, weights, rates, replaced samples, held-out figures.

The runs start as `dromos train` does: from a recipe, on one to three ranks, with every ZeRO stage, in micro-batches. The
reference (tests/support/reference) reads the same recipe and tars, and computes in float64 in one process.
"""

from __future__ import annotations

from collections import Counter

import pytest

from tests.support import reference_recipes as recipes
from tests.support.reference import weights
from tests.support.reference.flip import Flip
from tests.support.reference.training import NOT_DECAYED
from tests.support.reference_runs import TOWER, Cases, Job, assert_close, check_metrics, check_weights

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]
JOBS = (
    TOWER,
    *(Job("flip", 2, zero, resumed=zero == 0) for zero in (0, 1, 2, 3)),
    *(Job("flip", 2, zero, micro) for zero, micro in ((0, 3), (2, 1), (3, 3))),
    Job("clamped", 1, 0, 4),
    *(Job("clamped", 2, zero) for zero in (2, 3)),
    Job("sphinx", 1, 2, workers=2),
    *(Job("sphinx", 2, zero) for zero in (0, 3)),
    *(Job("sphinx", 2, zero, micro) for zero, micro in ((0, 3), (1, 1), (2, 3))),
    Job("sphinx", 2, 3, 1, resumed=True),
    Job("connector", 1, 3, resumed=True),
    *(Job("connector", 2, zero) for zero in (0, 2, 3)),
    *(Job("uneven_flip", 2, zero, resumed=zero == 2, workers=zero // 2) for zero in (0, 1, 2, 3)),
    *(Job("uneven_flip", 3, zero, micro) for zero, micro in ((0, None), (2, None), (3, 2))),
    *(Job("uneven_sphinx", 2, zero, micro) for zero, micro in ((0, 3), (2, None), (3, 1))),
    *(Job("uneven_sphinx", 3, zero, micro) for zero, micro in ((0, None), (1, 2), (2, 1))),
    Job("uneven_sphinx", 3, 3, 2, resumed=True),
)
each_job = pytest.mark.parametrize("job", JOBS, ids=str)
each_case = pytest.mark.parametrize("case", recipes.CASES)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(tmp_path_factory.mktemp("reference"))


@each_job
def test_metrics_of_every_step(cases: Cases, job: Job) -> None:
    check_metrics(cases, job)


@each_job
def test_gradients_of_the_first_step(cases: Cases, job: Job) -> None:
    """The first moment after one step is (1 - beta) times the clipped gradient."""
    expected = cases.reference(job.case)
    optimizer = {"betas": [0.9, 0.95], "clip": 1.0, **cases.recipes[job.case]["optimizer"]}
    norm = expected.steps[0]["grad_norm"]
    factor = (1 - optimizer["betas"][0]) * min(1.0, (optimizer["clip"] or norm) / norm)
    saved = weights.read_moments(cases.checkpoint(job, 1), expected.first)
    assert set(saved.first) == set(expected.first)
    for name, gradient in expected.first_gradients.items():
        assert_close(saved.first[name], factor * gradient, name)


@each_job
def test_weights_and_moments_after_the_last_step(cases: Cases, job: Job) -> None:
    check_weights(cases, job)


@each_job
def test_decayed_parameters_by_name(cases: Cases, job: Job) -> None:
    saved = weights.read_moments(cases.checkpoint(job, 1), cases.reference(job.case).first)
    decay = cases.recipes[job.case]["optimizer"]["weight_decay"]
    assert saved.decay == {name: 0.0 if NOT_DECAYED.fullmatch(name) else decay for name in saved.decay}


@each_case
def test_the_cases_exercise_what_they_are_for(cases: Cases, case: str) -> None:
    """Equality would prove nothing about a limit that is never reached, or about a model that does not learn."""
    recipe, reference = cases.recipes[case], cases.reference(case)
    objective = cases.objective(case)
    clip = recipe["optimizer"].get("clip", 1.0)
    assert not clip or any(row["grad_norm"] > 1.2 * clip for row in reference.steps)
    rows = [row for of_step in objective.rows[objective.main] for row in of_step]
    assert len({row.used for row in rows}) > 3
    assert {reason for row in rows for _, reason in row.attempts} == {
        "undecodable",
        "missing image",
        "missing caption",
    }
    if recipe["data"][objective.main]["image"].get("flip"):
        assert 0.2 < sum(row.crop[-1] for row in rows) / len(rows) < 0.8
    initial = {name: tensor.double() for name, tensor in cases.initial[case].items()}
    first, last = (float(objective.losses(given, 0)[0].detach()) for given in (initial, reference.weights))
    assert last < 0.95 * first, "the training does not lower the loss of its first batch"
    if isinstance(objective, Flip):
        check_flip_case(cases, case, objective)


def check_flip_case(cases: Cases, case: str, objective: Flip) -> None:
    """Twins in different halves of a batch, which two ranks hold; a clamped temperature; captions that repeat."""
    if case == "clamped":
        assert float(cases.reference(case).weights["logit_scale"].detach()) > 4.61
        return
    halves = []
    for of_step in objective.rows[objective.main]:
        half = len(of_step) // 2
        counts = [Counter(row.sample for row in part) for part in (of_step[:half], of_step[half:])]
        halves.append(sum((counts[0] & counts[1]).values()))
    assert sum(halves) >= 5
    assert sum(row["loss_floor"] > 0 for row in cases.reference(case).steps) >= 5
    assert (
        len({row["eval"]["zero_shot/colours/top1"] for row in cases.reference(case).steps if "eval" in row})
        > 2
    )
