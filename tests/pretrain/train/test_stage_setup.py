"""Lengths and rates in steps, and settings that no number of a training shows: they reach what they are for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from data_pipeline.errors import UserError
from data_pipeline.loader import loader
from data_pipeline.order.batch_schedule import BatchSchedule
from data_pipeline.workers.watchdog import StallLimits
from pretrain.build.module_weights import write_frozen
from pretrain.build.objective import Built
from pretrain.build.streams import cache_settings
from pretrain.distributed.engine import Runtime
from pretrain.recipe.schema import Recipe, Schedule, TrainStage
from pretrain.train.checkpoint import hash_file
from pretrain.train.resume import Start
from pretrain.train.stage_setup import StageContext, check_frozen, load_weights, make_plan, open_loader
from pretrain.train.trainer import GroupRate, Plan


def context(folder: Path, rank: int = 1, world: int = 3, **sections: Any) -> StageContext:
    given = {"objective": {"kind": "generative"}, "train": {"steps": 1}} | sections
    stage = TrainStage.model_validate(given)
    runtime = Runtime(rank, world, rank, torch.device("cpu"))
    return StageContext(Recipe(stages={"main": stage}), "main", stage, folder, runtime)


@pytest.mark.parametrize(("backend", "kind"), [("local", "LocalLoader"), ("ray", "RayLoader")])
def test_the_loader_has_the_settings_of_the_recipe(
    backend: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, tuple[Any, ...]]] = []
    for name in ("LocalLoader", "RayLoader"):
        monkeypatch.setattr(loader, name, lambda *arguments, name=name: made.append((name, arguments)))
    settings = {"backend": backend, "workers": 5, "stall_warn": 7.0, "stall_error": 90.0}
    open_loader(context(tmp_path, loader=settings, train={"steps": 1, "micro_batch": 4}), {})
    assert made == [(kind, ([], 1, 3, 5, 4, {}, StallLimits(warn=7.0, error=90.0)))]


def test_the_cache_has_the_folder_and_size_of_the_recipe(tmp_path: Path) -> None:
    found = cache_settings(
        context(tmp_path, loader={"cache": {"folder": str(tmp_path), "gigabytes": 1.5}}).stage
    )
    assert (found.folder, found.limit_bytes) == (str(tmp_path), 1_500_000_000)


def test_lengths_and_rates_of_a_batch_that_grows(tmp_path: Path) -> None:
    """8 rows for 10 steps, then 64: lengths count the rows served; intervals and the peak rate go by the full batch."""
    batches = BatchSchedule.of({0: 8, 10: 64})
    order: Any = SimpleNamespace(batches=batches, steps=batches.steps, samples_per_epoch=lambda: 100)
    stage = context(
        tmp_path,
        data={
            "text": {
                "sources": {"a": "x"},
                "text": {"format": "packed", "length": 4},
                "batch": {0: 8, 10: 64},
            }
        },
        train={"samples": 208, "hours": 2},
        schedule={"warmup": "81 samples"},
        optimizer={
            "lr_per_256": 0.1,
            "groups": [
                {"match": "llm", "lr": 0.1},
                {"match": "vision", "lr_scale": 0.5, "warmup": "9 steps"},
            ],
        },
        checkpoint={"every": "128 samples"},
        eval={"every": "1 epochs"},
    ).stage
    assert make_plan(stage, order) == Plan(
        total=12,
        warmup=11,
        peak_rate=0.025,
        save_every=2,
        evaluate_every=2,
        hours=2,
        groups=(GroupRate("llm", 4.0, 11), GroupRate("vision", 0.5, 9)),
    )


def test_rates_of_groups_follow_the_schedule_with_their_own_peak_and_warm_up() -> None:
    groups = (GroupRate("a", 3.0, 4), GroupRate("b", 0.5, 0))
    plan = Plan(10, 4, 0.2, 1, None, None, groups)
    schedule = Schedule(kind="linear", final_lr=0.1)
    expected = {
        0: (0.2 / 5, 3 * 0.2 / 5, 0.5 * 0.2),
        4: (0.2, 0.6, 0.5 * (0.1 + 0.1 * 6 / 10)),
        7: (0.15, 0.45, 0.5 * (0.1 + 0.1 * 3 / 10)),
    }
    for step, rates in expected.items():
        assert plan.rates(step, schedule) == pytest.approx(list(rates))


class Frozen:
    """An objective whose bias does not train."""

    def __init__(self) -> None:
        self.model = nn.Linear(2, 2)
        self.model.bias.requires_grad_(False)

    def frozen(self) -> dict[str, torch.Tensor]:
        return {"bias": self.model.bias.detach()}


def test_a_resume_takes_every_frozen_tensor_from_the_file_or_is_refused(tmp_path: Path) -> None:
    """The checkpoint has no frozen tensors: what the file lacks would stay as a new model has it."""
    path, kept = tmp_path / "main" / "frozen.safetensors", torch.tensor([3.0, -1.0])
    path.parent.mkdir()
    checkpoint = path.parent / "checkpoints" / "step_00000004"

    def load(saved_with: str | None) -> Frozen:
        objective = Frozen()
        start = Start(checkpoint, 4, {"frozen": saved_with}, path)
        built = Built(objective, {}, frozenset())  # type: ignore[arg-type]
        check_frozen(start)
        load_weights(context(tmp_path), built, start)
        return objective

    with pytest.raises(
        UserError, match=r"frozen.safetensors was not saved with step_00000004.* no tensor bias"
    ):
        load(None)
    write_frozen(path, {"weight": kept}, {})
    with pytest.raises(UserError, match=r"frozen.safetensors has no tensor bias, which this stage freezes"):
        load(hash_file(path))
    write_frozen(path, {"bias": kept}, {})
    with pytest.raises(UserError, match=r"is not the file that step_00000004 was saved with"):
        load(None)
    assert torch.equal(load(hash_file(path)).model.bias, kept)
