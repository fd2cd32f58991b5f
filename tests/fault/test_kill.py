"""kill -9 of a training at three instants: its log then equals that of an uninterrupted run, bit for bit.

The ranks are forked (tests/support/rank.py). tests/launch/test_local.py kills launchers.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.sources.tar import member_table
from tests.support import tiny
from tests.support.forks import fork, free_port, rank_environment, wait_all
from tests.support.rank import start_ranks

pytestmark = pytest.mark.dist
STEPS = 24


def finish(recipe: Path, world: int = 2) -> None:
    wait_all(start_ranks(recipe, world=world))


def kill_when(recipe: Path, reached: Callable[[], bool]) -> None:
    """Start the training and kill both ranks with SIGKILL as soon as `reached()` is true."""
    forks = start_ranks(recipe, world=2)
    forks[0].wait_for(reached, poll=0.0005)
    for each in forks:
        each.send_signal(signal.SIGKILL)
    for each in forks:
        assert each.code() == -signal.SIGKILL


def metrics(stage: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row.pop("time")
    return rows


def logged(stage: Path) -> int:
    """The step of the last complete line."""
    path = stage / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.mark.timeout(600)
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    tiny.make_data(tmp_path)
    spoil_images(tmp_path / "pairs" / "00000.tar")
    flip = tiny.write_recipe(tmp_path / "flip.yaml", tiny.flip_recipe(tmp_path, train={"steps": 1}))
    finish(flip, world=1)
    changes = {
        "train": {"steps": STEPS}, "engine": {"zero": 2}, "loader": {"workers": 1, "max_bad_fraction": 0.5},
        "eval": {"every": 8, "batch": 8, "perplexity": {
            "text": {"path": str(tmp_path / "text"), "length": tiny.LENGTH},
            "pairs": {"path": str(tmp_path / "pairs"), "stream": "captions"}}},
    }  # fmt: skip
    uninterrupted = tiny.sphinx_recipe(tmp_path, **changes)
    finish(tiny.write_recipe(tmp_path / "uninterrupted.yaml", uninterrupted))
    killed = uninterrupted | {
        "run": uninterrupted["run"] | {"name": "killed", "dir": str(tmp_path / "runs/killed")}
    }
    recipe = tiny.write_recipe(tmp_path / "killed.yaml", killed)
    stage = tmp_path / "runs" / "killed" / "main"

    kill_when(recipe, lambda: logged(stage) >= 7)
    saved = newest(stage)
    assert 5 <= saved < logged(stage), "the log is ahead of the newest checkpoint"

    # A save takes milliseconds and may end before the kill arrives; then the kill aims at the next save.
    for step in range(saved + 5, STEPS, 5):
        partial = stage / "checkpoints" / f"step_{step:08d}.tmp"
        kill_when(recipe, lambda folder=partial, step=step: has_files(folder) or newest(stage) >= step)
        if partial.exists():
            break
    assert partial.exists(), "every save ended before its kill, so nothing was tested"
    assert newest(stage) == step - 5

    logged_at: list[float] = []

    def later() -> bool:
        if logged(stage) >= step + 2 and not logged_at:
            logged_at.append(time.monotonic())
        return bool(logged_at) and time.monotonic() - logged_at[0] > 0.02  # somewhere between two lines

    kill_when(recipe, later)
    finish(recipe)
    whole = tmp_path / "runs" / "sphinx" / "main"
    assert metrics(stage) == metrics(whole)
    assert sum(sum(row["skipped"].get("pairs", {}).values()) for row in metrics(whole)) > 0
    assert (stage / "bad_samples.jsonl").read_text() == (whole / "bad_samples.jsonl").read_text()
    assert json.loads((stage / "result.json").read_text())["step"] == STEPS


@pytest.mark.timeout(600)
@pytest.mark.parametrize("at", [4, 8])
def test_a_run_killed_between_save_and_evaluation_makes_it_up(tmp_path: Path, at: int) -> None:
    """In the middle and at the end: the log, with all held-out figures, and the result are those of a whole run."""
    tiny.make_data(tmp_path)
    held_out = {"text": {"path": str(tmp_path / "text"), "length": tiny.LENGTH}}
    stages = []
    for name in ("whole", "killed"):
        sections = tiny.sphinx_recipe(
            tmp_path, train={"steps": 8}, engine={"zero": 2}, checkpoint={"every": 4},
            eval={"every": 4, "batch": 8, "perplexity": held_out},
        )  # fmt: skip
        sections["data"].pop("captions")
        sections["model"] = {"llm": sections["model"]["llm"]}
        sections["objective"] = {"kind": "generative"}
        sections["run"] = sections["run"] | {"dir": str(tmp_path / "runs" / name)}
        recipe = tiny.write_recipe(tmp_path / f"{name}.yaml", sections)
        stages.append(tmp_path / "runs" / name / "main")
        if name == "killed":
            port = free_port()
            dying = [
                fork(
                    "tests.fault.killed_evaluation", "main", (str(recipe), at), rank_environment(rank, 2, port),
                    tmp_path / f"dying.{rank}.log",
                )
                for rank in range(2)
            ]  # fmt: skip
            assert [each.code() for each in dying] == [-signal.SIGKILL] * 2
            assert newest(stages[1]) == logged(stages[1]) == at
            assert "eval" not in metrics(stages[1])[-1]
            assert not (stages[1] / "result.json").exists()
        finish(recipe)
    whole, killed = stages
    assert [row["step"] for row in metrics(whole) if "eval" in row] == [4, 8]
    assert metrics(killed) == metrics(whole)
    results = [json.loads((stage / "result.json").read_text()) for stage in stages]
    assert results[0]["eval"] == results[1]["eval"] == metrics(whole)[-1]["eval"]


def spoil_images(path: Path) -> None:
    """Overwrite the images of three samples, so that the comparison covers replaced samples."""
    table = member_table(path)
    content = bytearray(path.read_bytes())
    for sample in table[2:5]:
        offset, size = sample.members["jpg"]
        content[offset : offset + size] = b"x" * size
    path.write_bytes(content)


def has_files(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except FileNotFoundError:
        return False


def newest(stage: Path) -> int:
    complete = [p.parent.name for p in (stage / "checkpoints").glob("step_*/COMPLETE")]
    return max((int(name.removeprefix("step_")) for name in complete), default=0)
