"""`dromos status`: one line per stage, and one each for its skipped steps and failed evaluations."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli.app import app
from launch.status import run_status, status_lines
from pretrain.run.lock import FolderLock
from tests.support.report_runs import step_row, write_run, write_stage

TRAIN = {"kind": "train", "train": {"steps": 80}}
SKIPPED = {
    "values": ["loss", "loss/text"],
    "origin": {"stream": "text", "kind": "output", "module": "llm.layers.3"},
    "in_a_row": 1,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """masked has two skipped steps and three failed evaluations, real one each, calm none; late has not started."""
    folder = write_run(tmp_path / "run", dict.fromkeys(("masked", "real", "calm", "late"), TRAIN))
    rows = {
        name: [step_row(step, {"text": 2.0}, {"text": 8}) for step in range(1, 31)]
        for name in ("masked", "real", "calm")
    }
    rows["masked"][6] |= {"loss": None, "grad_norm": None, "non_finite": SKIPPED}
    rows["masked"][8] |= {"grad_norm": None, "non_finite": {"values": ["grad_norm"], "origin": None}}
    rows["masked"][9] |= {"eval_failed": {"zero_shot/digits": "gone", "perplexity/held": "gone too"}}
    rows["masked"][19] |= {"eval_failed": {"zero_shot/digits": "/held/3.tar: No such file"}}
    rows["real"][6] |= {"loss": None, "grad_norm": None, "non_finite": SKIPPED}
    rows["real"][9] |= {"eval": {"a/b/c": 1.0}, "eval_failed": {"perplexity/held": "gone"}}
    for name, found in rows.items():
        write_stage(folder / name, found, None)
    return folder


def test_skipped_steps_and_failed_evaluations_stand_below_their_stage(run: Path) -> None:
    lines = list(status_lines(run))
    assert [line.split()[0] for line in lines if not line.startswith("  ")] == [
        "masked",
        "real",
        "calm",
        "late",
    ]
    assert lines[1:3] == [
        "  2 steps skipped, a loss or the gradient was not finite; the last: step 9: grad_norm (not when computed "
        "again: suspect the hardware)",
        "  3 evaluations failed; the last: zero_shot/digits at step 20: /held/3.tar: No such file",
    ]
    assert lines[4:6] == [
        "  1 step skipped, a loss or the gradient was not finite: step 7: loss, loss/text (first in the output of "
        "llm.layers.3, stream text)",
        "  1 evaluation failed: perplexity/held at step 10: gone",
    ]
    assert len(lines) == 8
    assert CliRunner().invoke(app, ["status", str(run)]).stdout.splitlines() == lines


def states(run: Path) -> list[tuple[str, str]]:
    return [(stage.name, stage.state) for stage in run_status(run)]


def test_a_stage_runs_as_long_as_its_lock_is_held(run: Path) -> None:
    (run / "calm/result.json").write_text(json.dumps({"step": 30}))
    idle = [("masked", "not finished"), ("real", "not finished"), ("calm", "done"), ("late", "not started")]
    assert states(run) == idle
    launcher, rank = FolderLock(run, about={"what": "dromos run"}), FolderLock(run / "real")
    try:
        assert states(run) == [idle[0], ("real", "running"), *idle[2:]]
        lines = list(status_lines(run))
        assert "real             running      step 30/80  loss 2.0000" in lines
        assert lines[-1].startswith(f"being written by dromos run, pid {os.getpid()} on ")
    finally:
        rank.release()
        launcher.release()
    assert states(run) == idle  # the lock files are still there
    assert list(status_lines(run))[-1] == "late             not started"


def test_a_lock_that_cannot_be_read_is_no_error(run: Path) -> None:
    (run / "real/.lock").mkdir()
    assert dict(states(run))["real"] == "not finished"
