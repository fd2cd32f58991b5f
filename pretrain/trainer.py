"""The loop: batches in, one optimizer step, one line of metrics; save, evaluate and stop at step boundaries."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from data_pipeline.batches import Batch
from data_pipeline.digest import hex16
from pretrain import checkpoint
from pretrain.engine import Engine, Runtime
from pretrain.losses.contrastive import repeated_caption_floor
from pretrain.metrics import BadFraction, Log
from pretrain.objectives.base import Objective
from pretrain.recipe import TrainStage
from pretrain.rows import to_device
from pretrain.schedule import learning_rate
from pretrain.signals import StopFlag

LOW = (1 << 32) - 1
Batches = dict[str, list[Batch]]


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


class Agreement:
    """What all ranks know of a step before its forward: counts, digests, whether anyone was asked to stop."""

    def __init__(self, objective: Objective, batches: Batches, stop: bool, device: torch.device) -> None:
        flat = [batch for made in batches.values() for batch in made]
        served = sum(batch.batch_digest for batch in flat)
        assigned = sum(batch.order_digest for batch in flat)
        skipped = sum(sum(reasons.values()) for batch in flat for reasons in batch.skipped.values())
        numbers = [int(stop), skipped]
        for digest in (served, assigned):
            numbers += [digest & LOW, digest >> 32 & LOW]
        numbers += [int(sum(objective.count(name, b) for b in batches[name])) for name in objective.streams]
        numbers += [sum(b.stop - b.start for b in batches[name]) for name in objective.streams]
        values = all_sum(torch.tensor(numbers, dtype=torch.int64, device=device)).tolist()
        streams = objective.streams
        self.stop, self.any_skipped = values[0] > 0, values[1] > 0
        self.batch_digest = hex16((values[2] + (values[3] << 32)) & ((1 << 64) - 1))
        self.order_digest = hex16((values[4] + (values[5] << 32)) & ((1 << 64) - 1))
        self.counts = dict(zip(streams, values[6 : 6 + len(streams)], strict=True))
        self.rows = dict(zip(streams, values[6 + len(streams) :], strict=True))
        self.samples, self.skipped, self.bad = gather_counters(flat, self.any_skipped)


def all_sum(values: Tensor) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_counters(
    batches: list[Batch], skipped: bool
) -> tuple[dict[str, int], dict[str, dict[str, int]], list[dict[str, Any]]]:
    """Replaced samples by source and reason over all ranks; costs a collective only where there are any."""
    samples: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = {}
    bad: list[dict[str, Any]] = []
    for batch in batches:
        samples.update(batch.samples)
        bad += batch.bad
        for source, found in batch.skipped.items():
            reasons.setdefault(source, Counter()).update(found)
    if not skipped:
        return dict(samples), {}, []
    parts = checkpoint._everyone((dict(samples), {k: dict(v) for k, v in reasons.items()}, bad))
    samples, reasons, bad = Counter(), {}, []
    for counted, found, named in parts:
        samples.update(counted)
        bad += named
        for source, what in found.items():
            reasons.setdefault(source, Counter()).update(what)
    return dict(samples), {k: dict(sorted(v.items())) for k, v in sorted(reasons.items())}, bad


def caption_keys(batches: list[Batch]) -> Tensor:
    """An int64 a row, equal for equal captions."""
    keys = [xxhash.xxh64_intdigest(row.tobytes()) for batch in batches for row in batch.tokens]
    return torch.tensor([key - (1 << 64) if key >= 1 << 63 else key for key in keys], dtype=torch.int64)


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
    ) -> None:
        self.stage, self.stage_dir, self.objective, self.engine = stage, stage_dir, objective, engine
        self.loader, self.plan, self.runtime, self.stop = loader, plan, runtime, stop
        self.order_state, self.evaluate = order_state, evaluate
        self.bad = BadFraction(stage.loader.max_bad_fraction)
        self.last_saved = -1
        self.started = time.monotonic()
        self.log = Log(stage_dir / "metrics.jsonl") if runtime.rank == 0 else None
        self.bad_log = Log(stage_dir / "bad_samples.jsonl") if runtime.rank == 0 else None

    def run(self, first: int) -> bool:
        """Steps first..total-1. True when the stage reached its end, False when it saved because it was asked to."""
        self.last_saved = first
        mark = time.perf_counter()
        for done, batches in enumerate(self.loader.steps(first, self.plan.total), start=first + 1):
            row, asked = self.step(done - 1, batches)
            row["time"]["step"] = round(time.perf_counter() - mark, 6)
            row["time"]["samples_per_second"] = round(sum(row["samples"].values()) / row["time"]["step"], 2)
            last = done == self.plan.total
            if last or (self.plan.evaluate_every and done % self.plan.evaluate_every == 0):
                began = time.perf_counter()
                figures = self.evaluate()
                if figures:
                    row["eval"] = figures
                    row["time"]["eval"] = round(time.perf_counter() - began, 6)
            self.write(row)
            if last or asked or done % self.plan.save_every == 0:
                self.save(done)
            if asked and not last:
                return False
            mark = time.perf_counter()
        return True

    def step(self, step: int, batches: Batches) -> tuple[dict[str, Any], bool]:
        """One optimizer step; returns its line of metrics and whether any rank was asked to stop."""
        out_of_time = self.plan.hours is not None and time.monotonic() - self.started > self.plan.hours * 3600
        agreed = Agreement(self.objective, batches, bool(self.stop.asked) or out_of_time, self.runtime.device)
        self.engine.train()
        parts: dict[str, Tensor] = {}
        with self.engine.accumulate():
            for name in self.objective.streams:
                image = self.stage.data[name].image
                for batch in batches[name]:
                    rows = to_device(batch, image, self.runtime.device)
                    loss = self.objective.loss(self.engine, name, rows, float(agreed.counts[name]))
                    self.engine.backward(loss.total)
                    for key, value in {"loss": loss.total.detach(), **loss.parts}.items():
                        parts[key] = parts.get(key, torch.zeros_like(value)) + value
        names = sorted(parts)
        values = all_sum(torch.stack([parts[name].double().reshape(()) for name in names])).tolist()
        losses = dict(zip(names, values, strict=True))
        self.refuse_non_finite(step, losses)
        rate = learning_rate(
            step, self.plan.total, self.plan.warmup, self.plan.peak_rate, self.stage.schedule
        )
        norm = self.engine.step(rate)
        row: dict[str, Any] = {"step": step + 1, "loss": losses.pop("loss"), **losses}
        if self.stage.objective.kind == "flip":
            keys = caption_keys(batches[self.objective.main]).to(self.runtime.device)
            row["loss_floor"] = float(repeated_caption_floor(keys))
        row |= {"lr": rate, "grad_norm": norm, "samples": agreed.rows, "skipped": agreed.skipped}
        row |= {"batch_digest": agreed.batch_digest, "order_digest": agreed.order_digest}
        row["time"] = {"data_wait": round(self.loader.wait_seconds, 6)}
        self.account(step + 1, agreed)
        return row, agreed.stop

    def refuse_non_finite(self, step: int, losses: dict[str, float]) -> None:
        wrong = [
            name for name, value in losses.items() if value != value or value in (float("inf"), -float("inf"))
        ]
        if wrong:
            raise NonFinite(
                f"step {step + 1}: {', '.join(wrong)} is not finite; nothing was updated or saved. The last "
                f"checkpoint is of step {self.last_saved}. Lower the learning rate, or look at this step's batch."
            )

    def account(self, step: int, agreed: Agreement) -> None:
        """Name every replaced sample, and stop where there are too many."""
        if self.bad_log is not None:
            for found in agreed.bad:
                self.bad_log.write({"step": step, **found})
        self.bad.add(step, agreed.samples, agreed.skipped)

    def write(self, row: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(row)

    def save(self, step: int) -> None:
        state = {
            "step": step,
            "world_size": self.runtime.world_size,
            "zero": self.stage.engine.zero,
            "order": self.order_state(step),
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
    partial = stage_dir / "result.tmp"
    partial.write_text(json.dumps({"step": step, "eval": figures, "seconds": round(seconds, 3)}, indent=1))
    partial.replace(stage_dir / "result.json")
