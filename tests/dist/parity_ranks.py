"""One rank of the parity tests: trains a list of recipes one after the other in one process group."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import Batch
from data_pipeline.batches.work_items import micro_batches, rows_of
from pretrain.build.objective import build
from pretrain.build.streams import stage_specs
from pretrain.distributed.engine import Engine, join_process_group, leave_process_group
from pretrain.recipe.lengths import main_stream
from pretrain.recipe.load import load_recipe, run_dir
from pretrain.recipe.schema import TrainStage
from pretrain.train.stop_signals import StopFlag
from pretrain.train.trainer import Plan, Trainer


class InProcess:
    """A loader that builds batches in the training process."""

    wait_seconds = 0.0

    def __init__(self, builders: dict[str, BatchBuilder], rank: int, world: int, micro: int | None) -> None:
        self.builders, self.rank, self.world, self.micro = builders, rank, world, micro

    def steps(self, first: int, last: int) -> Iterator[dict[str, list[Batch]]]:
        for step in range(first, last):
            batches = {}
            for name, builder in self.builders.items():
                rows = rows_of(self.rank, self.world, builder.spec.rows(step))
                batches[name] = [builder.make(step, *part) for part in micro_batches(*rows, self.micro)]
            yield batches

    def close(self) -> None:
        pass


def main(jobs: list[dict]) -> None:
    """Each job: recipe, zero, out (a folder for metrics.jsonl), overrides."""
    runtime = join_process_group()
    flag = StopFlag()
    for job in jobs:
        recipe = load_recipe(job["recipe"], [f"engine.zero={job['zero']}", *job.get("overrides", [])])
        (name, stage), *_ = recipe.stages.items()
        assert isinstance(stage, TrainStage)
        objective, _ = build(stage, name, recipe.run.seed, run_dir(recipe))
        specs = stage_specs(stage, recipe.run.seed, name, objective.streams)
        builders = {spec.name: BatchBuilder(spec) for spec in specs}
        optimizer = stage.optimizer
        engine = Engine(
            objective.model, stage.engine.zero, stage.engine.dtype, optimizer.betas, optimizer.eps,
            optimizer.weight_decay, optimizer.clip, runtime,
        )  # fmt: skip
        total = stage.train.steps or 1
        plan = Plan(total, stage.schedule.warmup.value, optimizer.lr or 0.0, 1 << 30, None, None)
        loader = InProcess(builders, runtime.rank, runtime.world_size, stage.train.micro_batch)
        trainer = Trainer(
            stage, Path(job["out"]), objective, engine, loader, plan, runtime, flag, lambda step: {}, dict
        )
        trainer.save = lambda step: None  # type: ignore[method-assign]
        began = time.time()
        trainer.run(0)
        trainer.close()
        if runtime.rank == 0:
            print(job["out"], main_stream(stage), round(time.time() - began, 2), flush=True)
    leave_process_group()
