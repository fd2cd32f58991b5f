"""Checkpoints and weights of a window, compared with the averages computed step by step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UserError
from pretrain.merge.planning.checkpoint_windows import Window, expand, notes, schedule_weights
from pretrain.merge.spec import MergeSpec
from tests.support.merge_inputs import floats

COUNTS = [2, 3, 5, 8, 31]


def checkpoints(count: int) -> list[np.ndarray]:
    return [floats(seed, 6).astype(np.float64) for seed in range(count)]


def mean(schedule: str, x: list[np.ndarray], decay: float = 0.8) -> np.ndarray:
    weights = schedule_weights(schedule, len(x), decay)
    assert math.fsum(weights) == pytest.approx(1, abs=1e-12)
    return sum(w * one for w, one in zip(weights, x, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("count", COUNTS)
def test_uniform_is_the_mean(count: int) -> None:
    x = checkpoints(count)
    np.testing.assert_allclose(mean("uniform", x), np.mean(x, axis=0), rtol=1e-12)


@pytest.mark.parametrize("count", COUNTS)
def test_linear_takes_the_newest_most(count: int) -> None:
    x = checkpoints(count)
    repeated = [x[i] for i in range(count) for _ in range(i + 1)]  # the i-th checkpoint i times
    np.testing.assert_allclose(mean("linear", x), np.mean(repeated, axis=0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("decay", [0.1, 0.8, 0.99])
def test_ema_is_its_recurrence(count: int, decay: float) -> None:
    x = checkpoints(count)
    running = x[0]
    for one in x[1:]:
        running = decay * running + (1 - decay) * one
    np.testing.assert_allclose(mean("ema", x, decay), running, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    ("schedule", "factor"),
    [("1-sqrt", lambda x: 1 - math.sqrt(x)), ("uniform", lambda x: 1 - x)],
)
def test_a_merge_is_a_training_whose_updates_decay(count: int, schedule: str, factor: object) -> None:
    """WSM: starting at the oldest checkpoint, the i-th update is multiplied by the decay at i / count."""
    x = checkpoints(count)
    decayed = x[0].copy()
    for i in range(1, count):
        decayed += factor(i / count) * (x[i] - x[i - 1])  # type: ignore[operator]
    np.testing.assert_allclose(mean(schedule, x), decayed, rtol=1e-9, atol=1e-12)


def stage(folder: Path, steps: list[int], torn: tuple[int, ...] = ()) -> Path:
    """Checkpoints of a training with 2 captions and 3 texts of 10 tokens per step; without weights."""
    for step in steps:
        place = folder / "checkpoints" / f"step_{step:08d}"
        place.mkdir(parents=True)
        order = {"captions": {"consumed": {"a": step, "b": step}}, "text": {"consumed": {"c": 3 * step}}}
        (place / "state.json").write_text(json.dumps({"step": step, "order": order}))
        if step not in torn:
            (place / "COMPLETE").write_text("")
    (folder / "checkpoints" / "step_00000099.tmp").mkdir()
    data = "{captions: {image: {size: 32}, text: {length: 5}}, text: {length: 10}}"
    (folder / "resolved.yaml").write_text(f"stage: {{kind: train, data: {data}}}\n")
    return folder


@pytest.mark.parametrize(
    ("window", "steps"),
    [
        ({"last": 3}, [30, 40, 60]),
        ({"steps": (20, 40)}, [20, 30, 40]),
        ({"steps": (11, 59), "every": 20}, [20, 40]),
        ({"samples": (100, 200)}, [20, 30, 40]),  # 5 a step
        ({"tokens": (800, 1200)}, [20, 30]),  # 2 * 5 + 3 * 10 a step
        ({"last": 2, "every": 20}, [40, 60]),
    ],
)
def test_which_checkpoints(tmp_path: Path, window: dict[str, object], steps: list[int]) -> None:
    run = str(stage(tmp_path / "run/real", [10, 20, 30, 40, 50, 60], torn=(50,)))
    addresses, weights = expand(Window(run, **window))  # type: ignore[arg-type]
    assert addresses == [f"{run}@{step}" for step in steps]
    assert weights == [1 / len(steps)] * len(steps)


@pytest.mark.parametrize(
    ("window", "why"),
    [
        ({}, "one of last, steps, samples, tokens, not none"),
        ({"last": 2, "steps": (1, 2)}, "not last and steps"),
        ({"last": 1}, "must be 2 or more"),
        ({"last": 9}, r"has only 3 \(10, 20, 30\) of the 9"),
        ({"steps": (11, 29)}, "1 checkpoints of .* complete steps: 10, 20, 30"),
        ({"last": 2, "decay": 0.5}, "decay is for schedule ema"),
        ({"last": 2, "schedule": "ema", "decay": 1.0}, "between 0 and 1"),
        ({"last": 2, "every": 0}, "1 or more"),
    ],
)
def test_windows_that_are_refused(tmp_path: Path, window: dict[str, object], why: str) -> None:
    run = str(stage(tmp_path / "run/real", [10, 20, 30]))
    with pytest.raises(UserError, match=why):
        expand(Window(run, **window))  # type: ignore[arg-type]


def test_a_run_in_a_store_is_told_how() -> None:
    with pytest.raises(UserError, match="write inputs such as s3://bucket/r/real@STEP"):
        expand(Window("s3://bucket/r/real", last=2))


def test_a_run_without_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no complete checkpoint"):
        expand(Window(str(tmp_path), last=2))


def test_tokens_of_a_run_that_reads_no_text(tmp_path: Path) -> None:
    run = stage(tmp_path / "run/real", [10, 20, 30])
    (run / "resolved.yaml").write_text("stage: {kind: train, data: {captions: {image: {size: 32}}}}\n")
    with pytest.raises(UserError, match="has no tokens"):
        expand(Window(str(run), tokens=(0, 100)))


def test_checkpoints_that_are_not_equally_far_apart_are_noted() -> None:
    assert notes(["r@10", "r@20", "r@30"]) == []
    assert "10 to 30 steps apart" in notes(["r@10", "r@20", "r@50"])[0]


def test_a_spec_of_a_window_is_a_request_of_its_checkpoints(tmp_path: Path) -> None:
    run = str(stage(tmp_path / "run/real", [10, 20, 40]))
    spec = MergeSpec.model_validate({"window": {"run": run, "steps": "0:40", "schedule": "1-sqrt"}})
    asked = spec.to_request()
    assert asked.inputs == (f"{run}@10", f"{run}@20", f"{run}@40")
    assert asked.weights == tuple(schedule_weights("1-sqrt", 3))
    assert "10 to 20 steps apart" in asked.notes[0]
    for extra in ({"beta": 0.0}, {"weights": [1, 2, 3]}, {"inputs": ["a"]}):
        with pytest.raises(UserError, match="a window sets inputs and weights itself"):
            MergeSpec.model_validate({"window": {"run": run, "last": 2}} | extra).to_request()
    with pytest.raises(UserError, match="cannot use method slerp"):
        MergeSpec.model_validate({"method": "slerp", "window": {"run": run, "last": 2}}).to_request()
