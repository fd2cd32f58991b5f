"""Training runs beside the reference trainer: `Cases` holds data, recipes, initial weights, and the results of both."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from pretrain.build.module_weights import read_state
from pretrain.run.exit_codes import RUN_AGAIN
from tests.support import rank, tiny
from tests.support import reference_recipes as recipes
from tests.support.forks import wait_all
from tests.support.reference import weights
from tests.support.reference.flip import Flip
from tests.support.reference.sphinx import Sphinx, language_model
from tests.support.reference.training import Objective, Trained, train

# Largest error of a loss relative to its value, and of a tensor's elements relative to its largest element. Runs
# compute in float32, the reference in float64. A rounding is 6e-8, a path through a model has about a hundred, and ten
# steps build on each other; the largest errors found were 4e-6 and 1.6e-5.
LOSS_ERROR, TENSOR_ERROR = 1e-5, 1e-4


@dataclass(frozen=True)
class Job:
    """One training run of a case (a recipe). A resumed run is stopped after its first step and started again."""

    case: str
    world: int
    zero: int
    micro_batch: int | None = None
    workers: int = 0
    backend: str = "local"
    resumed: bool = False

    def __str__(self) -> str:
        micro = f"-micro-{self.micro_batch}" if self.micro_batch else ""
        ray, resumed = "-ray" * (self.backend == "ray"), "-resumed" * self.resumed
        return f"{self.case}-{self.world}-zero-{self.zero}{micro}{ray}{resumed}"

    def overrides(self, root: Path) -> list[str]:
        loader = [f"loader.workers={self.workers}", f"loader.backend={self.backend}"]
        micro = [f"train.micro_batch={self.micro_batch}"] if self.micro_batch else []
        return [f"engine.zero={self.zero}", f"run.dir={root / 'runs' / str(self)}", *loader, *micro]


TOWER = Job("flip", 1, 1, workers=2)  # its vision transformer is that of the SPHINX cases


class Cases:
    """The cases of reference_recipes.py in a folder: `reference` is what a run of the case must compute."""

    def __init__(self, root: Path) -> None:
        self.root = root
        recipes.make_data(root)
        self.initial: dict[str, dict[str, Tensor]] = {}
        self.recipes: dict[str, dict[str, Any]] = {}
        tower = str(self.stage_dir(TOWER))
        for case, make in recipes.CASES.items():
            init = root / "init" / case
            recipe = make(root, str(init), tower)
            self.initial[case] = initial_weights(recipe)
            weights.write(init, self.initial[case])
            path = tiny.write_recipe(root / f"{case}.yaml", recipe)
            self.recipes[case] = yaml.safe_load(path.read_text())
        self.run = cache(self._run)
        self.reference = cache(self._train)

    def stage_dir(self, job: Job) -> Path:
        return self.root / "runs" / str(job) / "main"

    def checkpoint(self, job: Job, step: int) -> Path:
        return self.run(job) / "checkpoints" / f"step_{step:08d}"

    def _run(self, job: Job) -> Path:
        """Train a job, once, and the tower that it needs; returns the folder of its stage."""
        if job.case in recipes.WITH_TOWER:
            self.run(TOWER)
        logs = self.root / "logs" / str(job)
        logs.mkdir(parents=True)
        recipe, overrides = self.root / f"{job.case}.yaml", job.overrides(self.root)
        if job.resumed:
            stopped = rank.start_ranks(recipe, *overrides, "train.hours=1e-9", world=job.world, logs=logs)
            assert [each.code() for each in stopped] == [RUN_AGAIN] * job.world, stopped[0].output
        wait_all(rank.start_ranks(recipe, *overrides, world=job.world, logs=logs))
        return self.stage_dir(job)

    def objective(self, case: str) -> Objective:
        recipe = self.recipes[case]
        if recipe["objective"]["kind"] == "contrastive":
            return Flip(recipe, "main", recipes.STEPS)
        tower = {name: tensor.double() for name, tensor in self.tower().items()}
        return Sphinx(recipe, "main", recipes.STEPS, tower, self.recipes["flip"]["model"]["vision"])

    def tower(self) -> dict[str, Tensor]:
        """The trained vision transformer of the SPHINX cases."""
        prefix = "visual."
        trained = read_state(str(self.run(TOWER)))
        return {name.removeprefix(prefix): t for name, t in trained.items() if name.startswith(prefix)}

    def _train(self, case: str) -> Trained:
        return train(self.recipes[case], self.objective(case), self.initial[case], recipes.STEPS)


def initial_weights(recipe: dict[str, Any]) -> dict[str, Tensor]:
    model = recipe["model"]
    if recipe["objective"]["kind"] == "contrastive":
        shapes = weights.flip_shapes(model, recipes.SIZE, recipes.LENGTH, recipes.VOCABULARY)
        found = weights.draw(shapes, 1) | {
            "logit_scale": torch.tensor(recipes.LOGIT_SCALE[recipe["run"]["name"]])
        }
        if model["vision"]["positions"] == "sincos":
            grid = recipes.SIZE // model["vision"]["patch"]
            found["visual.positional_embedding"] = weights.sincos(model["vision"]["width"], grid)
        return found
    llm = dict(language_model(model["llm"]).named_parameters())
    return weights.draw(
        weights.sphinx_shapes(llm, model["llm"]["config"]["hidden_size"], recipes.TOWER_WIDTH), 2
    )


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_metrics(cases: Cases, job: Job) -> None:
    """Every field of metrics.jsonl but `time`, and the replaced samples in bad_samples.jsonl."""
    found = json_lines(cases.run(job) / "metrics.jsonl")
    expected = cases.reference(job.case)
    assert len(found) == len(expected.steps) == recipes.STEPS
    for row, wanted in zip(found, expected.steps, strict=True):
        assert set(row) - {"time"} == set(wanted)
        for key, value in wanted.items():
            is_number = isinstance(value, float) or key == "eval"
            assert row[key] == (pytest.approx(value, rel=LOSS_ERROR) if is_number else value), (
                f"step {row['step']}: {key}"
            )
    replaced = json_lines(cases.run(job) / "bad_samples.jsonl")
    keys = ("step", "row", "attempt", "source", "key", "reason")
    assert sorted([line[key] for key in keys] for line in replaced) == sorted(expected.replaced)


def check_weights(cases: Cases, job: Job) -> None:
    """Moments and weights after the last step; of weights, the change that the training made."""
    expected = cases.reference(job.case)
    saved = weights.read_moments(cases.checkpoint(job, recipes.STEPS), expected.first)
    assert set(saved.first) == set(expected.first)
    for name, tensor in saved.first.items():
        assert_close(tensor, expected.first[name], f"first moment of {name}")
        assert_close(saved.second[name], expected.second[name], f"second moment of {name}")
    found = read_state(str(cases.run(job)))
    for name, tensor in expected.weights.items():
        initial = cases.initial[job.case][name].double()
        assert_close(
            found[name].reshape(tensor.shape) - initial, tensor.detach() - initial, f"change of {name}"
        )


def assert_close(found: Tensor, expected: Tensor, name: str) -> None:
    """A tensor that should not have changed must be equal."""
    error, largest = float((found - expected).abs().max()), float(expected.abs().max())
    assert error <= TENSOR_ERROR * largest, f"{name}: {error:.3g} beside a largest element of {largest:.3g}"
