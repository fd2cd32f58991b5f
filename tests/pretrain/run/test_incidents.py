"""Skipped steps and failed evaluations as they are read back from what a trainer logged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.run.incidents import (
    HARDWARE,
    FailedEvaluation,
    Incidents,
    Origin,
    SkippedStep,
    read_incidents,
)
from pretrain.run.metrics_log import read
from tests.support import fake_training as fake


def test_the_incidents_of_a_trainer_are_read_from_its_log(tmp_path: Path) -> None:
    """Row 5 of the stream `pairs` is not finite in the steps 2 and 4 of 6, and no evaluation can be read."""
    reason = "/held/00003.tar: No such file or directory"
    trainer, _ = fake.trainer(
        tmp_path, nan=(5,), nan_steps=(1, 3), evaluate_every=3, evaluate=dict, eval_failed={"zero_shot/held": reason}
    )  # fmt: skip
    assert trainer.run(0)
    trainer.close()
    skipped = [SkippedStep(step, ("loss", "loss/pairs"), Origin("pairs", "loss", None)) for step in (2, 4)]
    failed = [FailedEvaluation(step, "zero_shot/held", reason) for step in (3, 6)]
    assert read_incidents(tmp_path / "metrics.jsonl") == Incidents(skipped, failed)
    of_rows = Incidents()
    for row in read(tmp_path / "metrics.jsonl"):
        of_rows.add(row)
    assert of_rows == Incidents(skipped, failed)


def test_a_log_without_incidents_and_no_log_have_none(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert read_incidents(tmp_path / "metrics.jsonl") == Incidents()
    assert read_incidents(tmp_path / "absent/metrics.jsonl") == Incidents()


def test_damaged_fields_are_unknown_and_damaged_lines_are_left_out(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "non_finite": 3, "eval_failed": []}',
        '{"step": 2, "non_finite": {}}',
        '{"step": 3, "non_finite": {"values": ["loss"], "origin": {"module": 7}}}',
        '{"step": 4, "eval_failed": {"a": null}}',
        '{"step": "5", "non_finite": {}}',
        '{"step": 6, "non_finite": {"valu',
        "[" * 3000 + '"non_finite"',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    found = read_incidents(tmp_path / "metrics.jsonl")
    assert found.skipped == [SkippedStep(2, (), None), SkippedStep(3, ("loss",), Origin("?", "?", "7"))]
    assert found.failed == [FailedEvaluation(4, "a", "None")]


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        (None, HARDWARE),
        (Origin("pairs", "loss", None), "first in the loss, stream pairs"),
        (Origin("text", "output", "llm.0"), "first in the output of llm.0, stream text"),
    ],
)
def test_a_skipped_step_says_where_it_comes_from(origin: Origin | None, words: str) -> None:
    assert str(SkippedStep(7, ("loss", "loss/a"), origin)) == f"step 7: loss, loss/a ({words})"


def test_a_mark_inside_a_value_is_no_incident(tmp_path: Path) -> None:
    row = {"step": 1, "samples": {'"non_finite"': 3}, "note": "eval_failed"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert read_incidents(tmp_path / "metrics.jsonl") == Incidents()
