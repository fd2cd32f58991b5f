"""The training loop: per step one batch of every stream, one optimizer step, one line of metrics; saves, evaluates."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.storage.files import publish
from pretrain.distributed.collectives import all_sum
from pretrain.distributed.engine import Engine, Runtime
from pretrain.objectives.base import Objective
from pretrain.recipe.schema import TrainStage
from pretrain.run.failures import RunStopped, explain
from pretrain.run.metrics_log import JsonLog, read
from pretrain.train import checkpoint
from pretrain.train.bad_samples import BadFraction, BadShards, TooManyBadSamples
from pretrain.train.device_staging import copies_for, staged
from pretrain.train.schedule import learning_rate
from pretrain.train.step_totals import StepBatches, StepTotals
from pretrain.train.stop_signals import StopFlag

if TYPE_CHECKING:
    from data_pipeline.loader.loader import Loader


class UnreadableData(RunStopped):
    """A rank could not read its data after all retries; the run is saved before this is raised."""


class NonFinite(RunStopped):
    """A loss or the gradient norm is not finite; raised before the weights are updated."""


@dataclass(frozen=True)
class Plan:
    """Lengths and rates of a stage.

    total:          steps of the whole stage
    warmup:         steps of the warm-up
    peak_rate:      largest learning rate
    save_every:     steps between checkpoints
    evaluate_every: steps between evaluations; None evaluates at the end only
    hours:          wall-clock limit of one process (train.hours); None for no limit
    """

    total: int
    warmup: float
    peak_rate: float
    save_every: int
    evaluate_every: int | None
    hours: float | None


class Trainer:
    """Trains a stage up to `plan.total` steps.

    order_state:    step -> the data position after that step, by stream, for state.json
    evaluate:       returns the held-out metrics of the current weights, by name
    previous_state: state.json to take the bad-sample counts from; None: start at zero
    frozen_hash:    xxh64 of frozen.safetensors, written into every checkpoint
    """

    def __init__(
        self,
        stage: TrainStage,
        stage_dir: Path,
        objective: Objective,
        engine: Engine,
        loader: Loader,
        plan: Plan,
        runtime: Runtime,
        stop: StopFlag,
        order_state: Callable[[int], dict[str, Any]],
        evaluate: Callable[[], dict[str, float]],
        previous_state: dict[str, Any] | None = None,
        frozen_hash: str | None = None,
    ) -> None:
        self.stage, self.stage_dir, self.objective, self.engine = stage, stage_dir, objective, engine
        self.loader, self.plan, self.runtime, self.stop = loader, plan, runtime, stop
        self.order_state, self.evaluate = order_state, evaluate
        self.sources = sorted({source for name in objective.streams for source in stage.data[name].sources})
        self.bad_fraction = BadFraction(stage.loader.max_bad_fraction, (previous_state or {}).get("replaced"))
        self.bad_shards = BadShards(stage.loader.max_bad_in_shard, (previous_state or {}).get("bad_shards"))
        self.frozen_hash = frozen_hash
        self.copies = copies_for(runtime.device)
        self.last_saved = -1
        self.started = time.monotonic()
        self.log = JsonLog(stage_dir / "metrics.jsonl") if runtime.rank == 0 else None
        self.bad_log = JsonLog(stage_dir / "bad_samples.jsonl") if runtime.rank == 0 else None

    def run(self, first: int) -> bool:
        """Train the steps [first, total). True at the end of the stage; False when it saved and stopped before.

        It stops before the end on a stop signal, or after train.hours.

        Raises, after a save: UnreadableData when a rank could not read its data, UserError when a tar has changed,
        TooManyBadSamples when a limit of bad_samples.py stops the run. Raises NonFinite without a save.
        """
        self.last_saved = first
        batches_by_step = iter(self.loader.steps(first, self.plan.total))
        for done in range(first + 1, self.plan.total + 1):
            began = time.perf_counter()
            # 1. Batches, and the totals that all ranks need before the forward pass.
            batches, failure = self.next_batches(batches_by_step)
            out_of_time = (
                self.plan.hours is not None and time.monotonic() - self.started > self.plan.hours * 3600
            )
            stop = self.stop.signal_name is not None or out_of_time
            failed = failure is not None
            totals = StepTotals(self.objective, self.sources, batches, stop, failed, self.runtime.device)
            if totals.failed:
                self.save_and_raise(done - 1, failure)
            # 2. Optimizer step.
            row = self.step(done - 1, batches, totals)
            row["time"]["step"] = round(time.perf_counter() - began, 6)
            row["time"]["samples_per_second"] = round(sum(row["samples"].values()) / row["time"]["step"], 2)
            # 3. Evaluate, log, save, stop: in this order, so that a checkpoint is never ahead of the log.
            last = done == self.plan.total
            if last or (self.plan.evaluate_every and done % self.plan.evaluate_every == 0):
                began = time.perf_counter()
                metrics = self.evaluate()
                if metrics:
                    row["eval"] = metrics
                    row["time"]["eval"] = round(time.perf_counter() - began, 6)
            self.write(row, totals)
            shard, fraction = self.count_bad(done, totals)
            too_many = shard is not None or fraction is not None
            if last or totals.stop or too_many or done % self.plan.save_every == 0:
                self.save(done)
            if too_many:  # after the save, which waits for rank 0: the message quotes its bad_samples.jsonl
                raise TooManyBadSamples(self._shard_message(shard) or fraction)
            if totals.stop and not last:
                return False
        return True

    def next_batches(self, batches_by_step: Iterator[StepBatches]) -> tuple[StepBatches, Exception | None]:
        """The next step's batches, or the error of building them.

        The error is returned, not raised: the other ranks learn of it from the step's totals, else they would wait in
        a collective for this rank.
        """
        try:
            return next(batches_by_step), None
        except (OSError, UserError, MemoryError) as error:
            return {name: [] for name in self.objective.streams}, error

    def save_and_raise(self, done: int, failure: Exception | None) -> NoReturn:
        """Save after `done` steps and raise; `failure` is None when the failure is another rank's."""
        if done > self.last_saved:
            self.save(done)
        explained = explain(failure) if failure is not None else None
        reason = (
            explained.message
            if explained is not None
            else "another rank could not read its data; its log has the error"
        )
        saved = f"The run is saved at step {done}" if done else "No step was done yet"
        kind = UserError if isinstance(failure, UserError) else UnreadableData
        raise kind(f"step {done + 1}: {reason}. {saved}; run it again to resume.")

    def step(self, step: int, batches: StepBatches, totals: StepTotals) -> dict[str, Any]:
        """One optimizer step; returns its line of metrics. Raises NonFinite before anything is updated."""
        self.engine.train()
        parts: dict[str, Tensor] = {}
        with self.engine.accumulate():
            for name in self.objective.streams:
                image = self.stage.data[name].image
                denominator = float(totals.loss_denominators[name])  # summed over micro-batches and ranks
                for rows in staged(batches[name], image, self.runtime.device, self.copies):
                    loss = self.objective.loss(self.engine, name, rows, denominator)
                    self.engine.backward(loss.total)
                    for key, value in {"loss": loss.total.detach(), **loss.parts}.items():
                        parts[key] = parts.get(key, torch.zeros_like(value)) + value
        names = sorted(parts)
        values = all_sum(torch.stack([parts[name].double().reshape(()) for name in names])).tolist()
        losses = dict(zip(names, values, strict=True))
        non_finite = [name for name, value in losses.items() if not math.isfinite(value)]
        rate = learning_rate(
            step, self.plan.total, self.plan.warmup, self.plan.peak_rate, self.stage.schedule
        )
        norm = self.engine.step(rate) if not non_finite else None
        if norm is None:
            quantity = ", ".join(non_finite) or "the gradient norm"
            saved = (
                f"the last checkpoint is from step {self.last_saved}"
                if self.last_saved
                else "there is no checkpoint yet"
            )
            raise NonFinite(
                f"step {step + 1}: {quantity} is not finite; the weights were not updated, and {saved}. "
                f"Lower the learning rate; metrics.jsonl has loss and grad_norm of the steps before."
            )
        row: dict[str, Any] = {"step": step + 1, "loss": losses.pop("loss"), **losses}
        row |= self.objective.metrics(batches, self.runtime.device)
        row |= {"lr": rate, "grad_norm": norm, "samples": totals.rows, "skipped": totals.skipped}
        row |= {"batch_digest": totals.batch_digest, "order_digest": totals.order_digest}
        row["time"] = {"data_wait": round(self.loader.wait_seconds, 6)}
        return row

    def write(self, row: dict[str, Any], totals: StepTotals) -> None:
        """Append the step to metrics.jsonl, and every sample that was replaced in it to bad_samples.jsonl."""
        if self.log is not None and self.bad_log is not None:
            self.log.write(row)
            for line in totals.bad:
                self.bad_log.write(line | {"step": row["step"]})

    def count_bad(self, step: int, totals: StepTotals) -> tuple[str | None, str | None]:
        """Count a step's replaced samples; returns the shard at its limit, and the error text for a source over its."""
        fraction = self.bad_fraction.add(step, totals.samples, totals.skipped)
        return self.bad_shards.add(totals.bad), fraction

    def check_bad(self, step: int) -> None:
        """Raise TooManyBadSamples if the counts in the checkpoint of `step` are over a limit."""
        message = self.bad_fraction.over_limit(step, {}) or self._shard_message(self.bad_shards.over_limit())
        if message:
            raise TooManyBadSamples(message)

    def _shard_message(self, url: str | None) -> str | None:
        return url and self.bad_shards.message(url, read(self.stage_dir / "bad_samples.jsonl"))

    def save(self, step: int) -> None:
        """Write the checkpoint of `step`; collective. The logs reach the disk first: a resume needs their rows."""
        for log in (self.log, self.bad_log):
            if log is not None:
                log.sync()
        state = {
            "step": step,
            "world_size": self.runtime.world_size,
            "zero": self.stage.engine.zero,
            "order": self.order_state(step),
            "replaced": self.bad_fraction.state(),
            "bad_shards": self.bad_shards.state(),
            "frozen": self.frozen_hash,
        }
        checkpoint.save(
            self.stage_dir / "checkpoints", step, state, self.engine.save, self.stage.checkpoint.keep
        )
        self.last_saved = step

    def close(self) -> None:
        """Stop the loader's workers and close the logs, each also if another fails."""
        with ExitStack() as stack:
            for log in (self.log, self.bad_log):
                if log is not None:
                    stack.callback(log.close)
            self.loader.close()


def write_result(stage_dir: Path, step: int, seconds: float, metrics: dict[str, Any]) -> None:
    """Write result.json, atomically; its presence marks the stage as finished."""
    content = {"step": step, "eval": metrics, "seconds": round(seconds, 3)}
    publish(stage_dir / "result.json", json.dumps(content, indent=1).encode())
