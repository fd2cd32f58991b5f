"""The loop: batches in, one optimizer step, one line of metrics; save, evaluate and stop at step boundaries."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.storage.files import publish
from pretrain.distributed.collectives import all_sum
from pretrain.distributed.engine import Engine, Runtime
from pretrain.objectives.base import Objective
from pretrain.recipe.schema import TrainStage
from pretrain.run.metrics_log import Log, read
from pretrain.train import checkpoint
from pretrain.train.bad_samples import BadFraction, BadShards, TooManyBad
from pretrain.train.device_staging import copies_for, staged
from pretrain.train.schedule import learning_rate
from pretrain.train.step_totals import StepBatches, StepTotals
from pretrain.train.stop_flag import StopFlag


class Unreadable(RuntimeError):
    """Data could not be had on some rank, after retries; the run was saved first."""


class NonFinite(RuntimeError):
    """A loss is not a number; the run stops before the update."""


@dataclass(frozen=True)
class Plan:
    """The numbers of a stage that the loop needs, all in optimizer steps of this stage."""

    total: int
    warmup: float
    peak_rate: float
    save_every: int
    evaluate_every: int | None
    hours: float | None


class Trainer:
    """Runs a stage from `first` to the plan's end; everything it needs is handed in."""

    def __init__(
        self,
        stage: TrainStage,
        stage_dir: Path,
        objective: Objective,
        engine: Engine,
        loader: Any,
        plan: Plan,
        runtime: Runtime,
        stop: StopFlag,
        order_state: Callable[[int], dict[str, Any]],
        evaluate: Callable[[], dict[str, Any]],
        before: dict[str, Any] | None = None,
        frozen_hash: str | None = None,
    ) -> None:
        self.stage, self.stage_dir, self.objective, self.engine = stage, stage_dir, objective, engine
        self.loader, self.plan, self.runtime, self.stop = loader, plan, runtime, stop
        self.order_state, self.evaluate = order_state, evaluate
        self.sources = sorted({source for name in objective.streams for source in stage.data[name].sources})
        self.bad = BadFraction(stage.loader.max_bad_fraction, (before or {}).get("replaced"))
        self.bad_shards = BadShards(stage.loader.max_bad_in_shard, (before or {}).get("bad_shards"))
        self.frozen_hash = frozen_hash
        self.copies = copies_for(runtime.device)
        self.last_saved = -1
        self.started = time.monotonic()
        self.log = Log(stage_dir / "metrics.jsonl") if runtime.rank == 0 else None
        self.bad_log = Log(stage_dir / "bad_samples.jsonl") if runtime.rank == 0 else None

    def run(self, first: int) -> bool:
        """Steps first..total-1. True when the stage reached its end, False when it saved because it was asked to.

        Raises Unreadable, or the UserError of a tar that changed, after a save, when a rank's data could not be had.
        """
        self.last_saved = first
        made = iter(self.loader.steps(first, self.plan.total))
        for done in range(first + 1, self.plan.total + 1):
            mark = time.perf_counter()
            batches, failure = self.receive(made)
            out_of_time = (
                self.plan.hours is not None and time.monotonic() - self.started > self.plan.hours * 3600
            )
            asked = bool(self.stop.asked) or out_of_time
            failed = failure is not None
            agreed = StepTotals(self.objective, self.sources, batches, asked, failed, self.runtime.device)
            if agreed.failed:
                self.give_up(done - 1, failure)
            row = self.step(done - 1, batches, agreed)
            row["time"]["step"] = round(time.perf_counter() - mark, 6)
            row["time"]["samples_per_second"] = round(sum(row["samples"].values()) / row["time"]["step"], 2)
            last = done == self.plan.total
            if last or (self.plan.evaluate_every and done % self.plan.evaluate_every == 0):
                began = time.perf_counter()
                figures = self.evaluate()
                if figures:
                    row["eval"] = figures
                    row["time"]["eval"] = round(time.perf_counter() - began, 6)
            self.write(row, agreed)
            too_many = self.too_many(done, agreed)
            if last or agreed.stop or too_many or done % self.plan.save_every == 0:
                self.save(done)
            if too_many:
                raise TooManyBad(too_many)
            if agreed.stop and not last:
                return False
        return True

    def refuse_too_many(self, step: int) -> None:
        """Raise TooManyBad if the steps before `step`, as the checkpoint kept them, passed the limit."""
        told = self.bad.over_limit(step, {}) or self.told_of_shard(self.bad_shards.over_limit())
        if told:
            raise TooManyBad(told)

    def too_many(self, step: int, agreed: StepTotals) -> str | None:
        """Count a step's replaced samples; what to tell the user when they pass a limit, else None."""
        fraction = self.bad.add(step, agreed.samples, agreed.skipped)
        shard = self.bad_shards.add(agreed.bad)
        return self.told_of_shard(shard) or fraction

    def told_of_shard(self, url: str | None) -> str | None:
        """What to tell the user of a shard with too many unusable samples."""
        return url and self.bad_shards.told(url, read(self.stage_dir / "bad_samples.jsonl"))

    def receive(self, made: Iterator[StepBatches]) -> tuple[StepBatches, Exception | None]:
        """The next step's batches, or why they could not be made: the other ranks must hear of it first."""
        try:
            return next(made), None
        except (OSError, UserError, MemoryError) as error:
            return {name: [] for name in self.objective.streams}, error

    def give_up(self, done: int, failure: Exception | None) -> NoReturn:
        """Save what has been done and stop with the name of what could not be read, or is not what it was."""
        if done > self.last_saved:
            self.save(done)
        why = (
            str(failure) or "out of memory"
            if failure is not None
            else "another rank could not read its data; its log says which"
        )
        kept = f"The run is saved at step {done}" if done else "Nothing was done yet"
        kind = UserError if isinstance(failure, UserError) else Unreadable
        raise kind(f"step {done + 1}: {why}. {kept}; run it again to go on.")

    def step(self, step: int, batches: StepBatches, agreed: StepTotals) -> dict[str, Any]:
        """One optimizer step; returns its line of metrics. Raises NonFinite before anything is updated."""
        self.engine.train()
        parts: dict[str, Tensor] = {}
        with self.engine.accumulate():
            for name in self.objective.streams:
                image = self.stage.data[name].image
                for rows in staged(batches[name], image, self.runtime.device, self.copies):
                    loss = self.objective.loss(self.engine, name, rows, float(agreed.counts[name]))
                    self.engine.backward(loss.total)
                    for key, value in {"loss": loss.total.detach(), **loss.parts}.items():
                        parts[key] = parts.get(key, torch.zeros_like(value)) + value
        names = sorted(parts)
        values = all_sum(torch.stack([parts[name].double().reshape(()) for name in names])).tolist()
        losses = dict(zip(names, values, strict=True))
        wrong = [name for name, value in losses.items() if not math.isfinite(value)]
        rate = learning_rate(
            step, self.plan.total, self.plan.warmup, self.plan.peak_rate, self.stage.schedule
        )
        norm = self.engine.step(rate) if not wrong else None
        if norm is None:
            what = ", ".join(wrong) or "the gradient norm"
            kept = (
                f"the last checkpoint is of step {self.last_saved}"
                if self.last_saved
                else "nothing was saved yet"
            )
            raise NonFinite(
                f"step {step + 1}: {what} is not finite; the weights were not updated, and {kept}. "
                f"Lower the learning rate, or look at this step's batch."
            )
        row: dict[str, Any] = {"step": step + 1, "loss": losses.pop("loss"), **losses}
        row |= self.objective.figures(batches, self.runtime.device)
        row |= {"lr": rate, "grad_norm": norm, "samples": agreed.rows, "skipped": agreed.skipped}
        row |= {"batch_digest": agreed.batch_digest, "order_digest": agreed.order_digest}
        row["time"] = {"data_wait": round(self.loader.wait_seconds, 6)}
        return row

    def write(self, row: dict[str, Any], agreed: StepTotals) -> None:
        """The step's line, and the name of every sample that was replaced in it."""
        if self.log is not None and self.bad_log is not None:
            self.log.write(row)
            for found in agreed.bad:
                self.bad_log.write(found | {"step": row["step"]})

    def save(self, step: int) -> None:
        state = {
            "step": step,
            "world_size": self.runtime.world_size,
            "zero": self.stage.engine.zero,
            "order": self.order_state(step),
            "replaced": self.bad.state(),
            "bad_shards": self.bad_shards.state(),
            "frozen": self.frozen_hash,
        }
        checkpoint.save(
            self.stage_dir / "checkpoints", step, state, self.engine.save, self.stage.checkpoint.keep
        )
        self.last_saved = step

    def close(self) -> None:
        self.loader.close()
        for log in (self.log, self.bad_log):
            if log is not None:
                log.close()


def write_result(stage_dir: Path, step: int, seconds: float, figures: dict[str, Any]) -> None:
    """The stage is done: result.json, written whole or not at all."""
    content = {"step": step, "eval": figures, "seconds": round(seconds, 3)}
    publish(stage_dir / "result.json", json.dumps(content, indent=1).encode())
