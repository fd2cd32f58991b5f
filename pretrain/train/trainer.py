"""The training loop: per step one batch of every stream, one optimizer step, one line of metrics; saves, evaluates.

A step's line is written first, then its checkpoint, then its evaluation, whose figures are put into the line. A kill
between two of them loses nothing: a checkpoint is never ahead of the log, and a resume makes up a missing evaluation.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.storage.files import publish
from pretrain.distributed.collectives import all_sum, from_rank_0, gather
from pretrain.distributed.engine import Engine, Runtime
from pretrain.objectives.base import Objective
from pretrain.recipe.schema import Schedule, TrainStage
from pretrain.run.bad_sample_log import read_bad_samples
from pretrain.run.failures import RunStopped, explain
from pretrain.run.incidents import HARDWARE, Origin
from pretrain.run.metrics_log import JsonLog, read
from pretrain.train import checkpoint
from pretrain.train.bad_samples import BadFraction, BadShards, TooManyBadSamples
from pretrain.train.device_staging import StagedBatches, copies_for
from pretrain.train.non_finite import NonFinite, find_origin
from pretrain.train.schedule import learning_rate
from pretrain.train.step_totals import StepBatches, StepTotals
from pretrain.train.stop_signals import StopFlag

if TYPE_CHECKING:
    from data_pipeline.loader.loader import Loader


class UnreadableData(RunStopped):
    """A rank could not read its data after all retries; the run is saved before this is raised."""


@dataclass(frozen=True)
class GroupRate:
    """The learning rate of one of `optimizer.groups`.

    match:  its expression, its name in the log
    scale:  its peak divided by that of the stage
    warmup: steps of its warm-up
    """

    match: str
    scale: float
    warmup: float


@dataclass(frozen=True)
class Plan:
    """Lengths and rates of a stage.

    total:          steps of the whole stage
    warmup:         steps of the warm-up
    peak_rate:      largest learning rate
    save_every:     steps between checkpoints
    evaluate_every: steps between evaluations; None evaluates at the end only
    hours:          wall-clock limit of one process (train.hours); None for no limit
    groups:         rates of optimizer.groups, in their order
    """

    total: int
    warmup: float
    peak_rate: float
    save_every: int
    evaluate_every: int | None
    hours: float | None
    groups: tuple[GroupRate, ...] = ()

    def rates(self, step: int, schedule: Schedule) -> list[float]:
        """Learning rates of a step: outside the groups, then of each group."""
        scales = [(1.0, self.warmup), *((group.scale, group.warmup) for group in self.groups)]
        return [
            scale * learning_rate(step, self.total, warmup, self.peak_rate, schedule)
            for scale, warmup in scales
        ]


class Trainer:
    """Trains a stage up to `plan.total` steps.

    order_state:    step -> the data position after that step, by stream, for state.json
    evaluate:       returns the held-out metrics of the current weights by name, and the reasons of tasks that failed
    previous_state: state.json to take the counts of bad samples and skipped steps from; None: start at zero
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
        evaluate: Callable[[], tuple[dict[str, float], dict[str, str]]],
        previous_state: dict[str, Any] | None = None,
        frozen_hash: str | None = None,
    ) -> None:
        self.stage, self.stage_dir, self.objective, self.engine = stage, stage_dir, objective, engine
        self.loader, self.plan, self.runtime, self.stop = loader, plan, runtime, stop
        self.order_state, self.evaluate = order_state, evaluate
        self.sources = sorted({source for name in objective.streams for source in stage.data[name].sources})
        self.bad_fraction = BadFraction(stage.loader.max_bad_fraction, (previous_state or {}).get("replaced"))
        self.bad_shards = BadShards(stage.loader.max_bad_in_shard, (previous_state or {}).get("bad_shards"))
        self.skipped_in_a_row = int((previous_state or {}).get("skipped_in_a_row", 0))
        self.frozen_hash = frozen_hash
        self.copies = copies_for(runtime.device)
        self.last_saved = -1
        self.last_line: str | None = None  # of metrics.jsonl, on rank 0; state.json has it
        self.started = time.monotonic()
        self.log = JsonLog(stage_dir / "metrics.jsonl") if runtime.rank == 0 else None
        self.bad_log = JsonLog(stage_dir / "bad_samples.jsonl") if runtime.rank == 0 else None

    def run(self, first: int) -> bool:
        """Train the steps [first, total). True at the end of the stage; False when it saved and stopped before.

        It stops on a stop signal, or after train.hours, and then does not evaluate: the next start makes that up.

        Raises, after a save: UnreadableData when a rank could not read its data, UserError when a tar has changed,
        TooManyBadSamples when a limit of bad_samples.py stops the run, NonFinite when train.max_skipped steps in a row
        were skipped and the next one is not finite either.
        """
        self.last_saved = first
        if not self.make_up_evaluation(first):
            return False
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
            self.count_non_finite(row)
            row["time"]["step"] = round(time.perf_counter() - began, 6)
            row["time"]["samples_per_second"] = round(sum(row["samples"].values()) / row["time"]["step"], 2)
            # 3. Log, save, stop, evaluate: in this order, so that a checkpoint is never ahead of the log.
            self.write(row, totals)
            shard, fraction = self.count_bad(done, totals)
            too_many = shard is not None or fraction is not None
            last = done == self.plan.total
            if last or totals.stop or too_many or done % self.plan.save_every == 0:
                self.save(done)
            if too_many:  # after the save, which waits for rank 0: the message quotes its bad_samples.jsonl
                raise TooManyBadSamples(self._shard_message(shard) or fraction)
            due = self.evaluation_is_due(done)
            if totals.stop and (due or not last):
                return False
            if due:
                self.evaluate_into(row)
        return True

    def evaluation_is_due(self, step: int) -> bool:
        """True if the stage has held-out sets and evaluates after `step` steps."""
        every = self.plan.evaluate_every
        at_step = step == self.plan.total or (every is not None and step > 0 and step % every == 0)
        return at_step and any(self.stage.eval.tasks())

    def evaluate_into(self, row: dict[str, Any]) -> None:
        """Evaluate, and put the figures into `row`, the last line of metrics.jsonl; collective."""
        began = time.perf_counter()
        metrics, failed = self.evaluate()
        if self.log is None or not (metrics or failed):
            return
        for name, reason in failed.items():
            print(
                f"dromos: step {row['step']}: the evaluation {name} failed: {reason}; its figures of this step are "
                "missing, the training goes on",
                flush=True,
            )
        times = row.pop("time") | {"eval": round(time.perf_counter() - began, 6)}
        row.pop("eval_failed", None)
        found = {"eval": metrics, "eval_failed": failed}
        row |= {key: value for key, value in found.items() if value} | {"time": times}
        self.last_line = self.log.amend(row)

    def make_up_evaluation(self, first: int) -> bool:
        """Evaluate after a resume if the run ended between the save of step `first` and its evaluation; collective.

        Also if that evaluation failed. Returns False, without an evaluation, if a rank was asked to stop meanwhile. A
        stage that continues another one has no line of that step: the evaluation is the other stage's.
        """
        rows = read(self.stage_dir / "metrics.jsonl") if self.log is not None else []
        row = rows[-1] if rows and rows[-1]["step"] == first else None
        done = row is None or ("eval" in row and "eval_failed" not in row)
        missing = not done and self.evaluation_is_due(first)
        if not from_rank_0(missing):
            return True
        if any(gather(self.stop.signal_name is not None)):
            return False
        self.evaluate_into(row if row is not None else {"time": {}})
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
        """One optimizer step; returns its line of metrics.

        If a loss or the gradient norm is not finite, no rank updates, and the line has `non_finite`.
        """
        self.engine.train()
        parts: dict[str, Tensor] = {}
        with self.engine.accumulate():
            for name in self.objective.streams:
                denominator = float(totals.loss_denominators[name])  # summed over micro-batches and ranks
                rows = self.rows_of(name, batches)
                for key, value in self.objective.backward(self.engine, name, rows, denominator).items():
                    parts[key] = parts.get(key, torch.zeros_like(value)) + value
        names = sorted(parts)
        values = all_sum(torch.stack([parts[name].double().reshape(()) for name in names])).tolist()
        losses = dict(zip(names, values, strict=True))
        non_finite = [name for name, value in losses.items() if not math.isfinite(value)]
        rates = self.plan.rates(step, self.stage.schedule)
        if non_finite:
            self.engine.discard()
        norm = self.engine.step(*rates) if not non_finite else None
        row: dict[str, Any] = {"step": step + 1, "loss": losses.pop("loss"), **losses}
        row |= self.objective.metrics(batches, self.runtime.device)
        row |= {"lr": rates[0], "grad_norm": norm, "samples": totals.rows, "skipped": totals.skipped}
        if self.plan.groups:
            of_groups = zip(self.plan.groups, rates[1:], strict=True)
            row["lr_groups"] = {group.match: rate for group, rate in of_groups}
        if norm is None:
            row["non_finite"] = self.describe_non_finite(non_finite or ["grad_norm"], batches, totals)
        row |= {"batch_digest": totals.batch_digest, "order_digest": totals.order_digest}
        row["time"] = {"data_wait": round(self.loader.wait_seconds, 6)}
        return row

    def rows_of(self, stream: str, batches: StepBatches) -> StagedBatches:
        """This rank's micro-batches of a stream, on the device."""
        image = self.stage.data[stream].image
        return StagedBatches(batches[stream], image, self.runtime.device, self.copies)

    def describe_non_finite(
        self, values: list[str], batches: StepBatches, totals: StepTotals
    ) -> dict[str, Any]:
        """The field `non_finite` of a skipped step's line: what was not finite, and where it came from. Collective."""
        origin = find_origin(
            self.engine, self.objective, lambda name: self.rows_of(name, batches), totals.loss_denominators
        )
        return {"values": values, "origin": asdict(origin) if origin is not None else None}

    def count_non_finite(self, row: dict[str, Any]) -> None:
        """Count skipped steps in a row; raises NonFinite, after a save, for one more than train.max_skipped."""
        if "non_finite" not in row:
            self.skipped_in_a_row = 0
            return
        step, most = row["step"], self.stage.train.max_skipped
        given = row["non_finite"]
        origin = Origin(**given["origin"]) if given["origin"] else HARDWARE
        text = f"step {step}: {', '.join(given['values'])} is not finite ({origin})"
        if self.skipped_in_a_row < most:
            self.skipped_in_a_row += 1
            given["in_a_row"] = self.skipped_in_a_row
            if self.runtime.rank == 0:
                print(
                    f"dromos: {text}; the step was skipped, {self.skipped_in_a_row} in a row "
                    f"(train.max_skipped is {most})",
                    flush=True,
                )
            return
        if step - 1 > self.last_saved:  # the weights are those of the last finite step
            self.save(step - 1)
        before = f"The {most} steps before it were skipped" if most else "No step is skipped"
        saved = f"the run is saved at step {step - 1}" if step > 1 else "no step was done yet"
        raise NonFinite(
            f"{text}. {before} (train.max_skipped is {most}), the weights were not updated, and {saved}. Look at loss "
            f"and grad_norm in metrics.jsonl; lower optimizer.lr in a new stage that starts from a checkpoint (init or "
            f"continue), or raise train.max_skipped and run it again."
        )

    def write(self, row: dict[str, Any], totals: StepTotals) -> None:
        """Append the step to metrics.jsonl, and every sample that was replaced in it to bad_samples.jsonl."""
        if self.log is not None and self.bad_log is not None:
            self.last_line = self.log.write(row)
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
        if url is None:
            return None
        logged = read_bad_samples(self.stage_dir / "bad_samples.jsonl")
        return f"{self.bad_shards.message(url, logged.lines)} {logged.note}".rstrip()

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
            "skipped_in_a_row": self.skipped_in_a_row,
            "frozen": self.frozen_hash,
            "line": self.last_line,
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
