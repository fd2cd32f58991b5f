"""Modes of a training that evaluates on the way: train mode and masks in a step, neither of them in an evaluation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import Batch
from pretrain.build.objective import build
from pretrain.build.streams import stage_specs
from pretrain.distributed.engine import Engine, Runtime
from pretrain.recipe.schema import Recipe, TrainStage
from pretrain.train.stage_setup import StageContext, make_evaluation
from pretrain.train.trainer import Plan, Trainer
from tests.support import setting_runs

RUNTIME = Runtime(0, 1, 0, torch.device("cpu"))


class PlainEngine:
    """The engine's interface with plain SGD; records the mode of every forward."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        self.seen: list[tuple[str, bool, bool, bool]] = []

    def __call__(self, **inputs: Any) -> Any:
        kind = "step" if {"images", "tokens"} <= inputs.keys() or "used" in inputs else "figure"
        kept = inputs.get("keep") is not None
        self.seen.append((kind, self.module.training, torch.is_grad_enabled(), kept))
        return self.module(**inputs)

    def train(self, mode: bool = True) -> None:
        self.module.train(mode)

    def accumulate(self) -> Any:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, rate: float) -> float:
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return 1.0

    def save(self, folder: Path, tag: str) -> None:
        (folder / tag).mkdir(parents=True, exist_ok=True)
        (folder / tag / "weights").write_text("")


class InProcess:
    """A loader that builds whole global batches when asked."""

    wait_seconds = 0.0

    def __init__(
        self, builders: dict[str, BatchBuilder], before_step: Callable[[int], None] | None = None
    ) -> None:
        self.builders, self.before_step = builders, before_step

    def steps(self, first: int, last: int) -> Iterator[dict[str, list[Batch]]]:
        for step in range(first, last):
            if self.before_step is not None:
                self.before_step(step)
            yield {
                name: [builder.make(step, 0, builder.spec.rows(step))]
                for name, builder in self.builders.items()
            }

    def close(self) -> None:
        pass


def test_an_evaluation_leaves_no_trace_in_the_training(tmp_path: Path) -> None:
    setting_runs.make_data(tmp_path)
    given = setting_runs.recipes(tmp_path)["flip_eval"]
    given = {key: value for key, value in given.items() if key not in ("run", "stages")}
    losses: dict[int | None, list[float]] = {}
    for every in (1, None):
        stage = TrainStage.model_validate(given)
        objective = build(stage, "main", 3, None).objective
        engine = PlainEngine(objective.model)
        context = StageContext(Recipe(stages={"main": stage}), "main", stage, tmp_path, RUNTIME)
        folder = tmp_path / f"run-{every}"
        folder.mkdir()
        builders = {
            spec.name: BatchBuilder(spec) for spec in stage_specs(stage, 3, "main", objective.streams)
        }
        trainer = Trainer(
            stage, folder, objective, engine, InProcess(builders), Plan(3, 0, 0.1, 99, every, None), RUNTIME,  # type: ignore[arg-type]
            SimpleNamespace(signal_name=None), lambda step: {}, make_evaluation(context, objective, engine),  # type: ignore[arg-type]
        )  # fmt: skip
        assert trainer.run(0)
        trainer.close()
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[every] = [row["loss"] for row in rows]
        assert ["eval" in row for row in rows] == [every == 1, every == 1, True]
        # A step: train mode, gradients, a mask. Figures: three classes of prompts and the images, without any of them.
        one, figures = [("step", True, True, True)], [("figure", False, False, False)] * 4
        expected = (one + figures) * 3 if every else one * 3 + figures
        assert engine.seen == expected
    assert losses[1] == losses[None]
    assert len(set(losses[1])) == 3


def test_a_held_out_set_that_vanishes_costs_an_evaluation_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is there at the start, gone at step 2, and back at step 3; another task is not disturbed."""
    setting_runs.make_data(tmp_path)
    given = setting_runs.recipes(tmp_path)["flip_eval"]
    given = {key: value for key, value in given.items() if key not in ("run", "stages")}
    task = given["eval"]["zero_shot"]["held"]
    shutil.copytree(tmp_path / "held", tmp_path / "other_held")
    tasks = {"held": task, "other": task | {"path": str(tmp_path / "other_held")}}
    stage = TrainStage.model_validate(given | {"eval": {"zero_shot": tasks}})
    objective = build(stage, "main", 3, None).objective
    engine = PlainEngine(objective.model)
    context = StageContext(Recipe(stages={"main": stage}), "main", stage, tmp_path, RUNTIME)
    builders = {spec.name: BatchBuilder(spec) for spec in stage_specs(stage, 3, "main", objective.streams)}

    def move(step: int) -> None:
        if step in (1, 2):
            names = ["held", "away"]
            (tmp_path / names[step - 1]).rename(tmp_path / names[step - 2])

    trainer = Trainer(
        stage, tmp_path, objective, engine, InProcess(builders, move), Plan(3, 0, 0.1, 99, 1, None), RUNTIME,  # type: ignore[arg-type]
        SimpleNamespace(signal_name=None), lambda step: {}, make_evaluation(context, objective, engine),  # type: ignore[arg-type]
    )  # fmt: skip
    assert trainer.run(0)
    trainer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    both = {f"zero_shot/{name}/top1" for name in tasks}
    assert [set(row["eval"]) for row in rows] == [both, {"zero_shot/other/top1"}, both]
    assert [list(row.get("eval_failed", {})) for row in rows] == [[], ["zero_shot/held"], []]
    said = [line for line in capsys.readouterr().out.splitlines() if "failed" in line]
    (line,) = said
    assert line.startswith("dromos: step 2: the evaluation zero_shot/held failed: ")
    assert str(tmp_path / "held") in line
    assert line.endswith("; its figures of this step are missing, the training goes on")


def test_a_step_after_an_evaluation_is_in_train_mode_again() -> None:
    """As `Trainer.step` and `make_evaluation` ask for it, of the engine that a run has."""
    engine = object.__new__(Engine)
    engine._engine = torch.nn.Dropout()
    engine.train(False)
    assert not engine._engine.training
    engine.train()
    assert engine._engine.training
