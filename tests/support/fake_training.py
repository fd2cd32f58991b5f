"""A trainer whose objective, engine and data are a few lines of arithmetic, so that every figure can be said by hand.

Two streams have ROWS rows a step each. Row r of step s has tokens s + r, of which 1 + r % LENGTH count, is sample s + r
of source "even" or "odd", and its captions repeat every four rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batches.spec import Batch
from pretrain.distributed.collectives import rank, world_size
from pretrain.distributed.engine import Runtime
from pretrain.losses.normalisation import count_rows, count_targets, part_of_global_mean
from pretrain.objectives import base
from pretrain.objectives.base import Loss
from pretrain.objectives.device_batch import DeviceBatch
from pretrain.recipe.schema import Schedule
from pretrain.train.trainer import Plan, Trainer

ROWS, LENGTH, STEPS = 12, 4, 6
STREAMS = ("pairs", "text")
MASK = (1 << 64) - 1


def source_of(step: int, row: int) -> str:
    return "odd" if (step + row) % 2 else "even"


def digest_of(stream: str, step: int, row: int) -> int:
    """64 bits with all bits in use, so that sums over rows overflow."""
    return (row + 1 + 100 * step + 7 * len(stream)) * 0x9E3779B97F4A7C15 & MASK


def bad_line(stream: str, step: int, row: int) -> dict[str, Any]:
    reason = "undecodable" if row % 3 else "missing image"
    return {
        "row": row, "stream": stream, "source": source_of(step, row), "reason": reason, "attempt": 0,
        "url": f"{source_of(step, row)}.tar", "key": f"{step}-{row}", "epoch": 0, "detail": "",
    }  # fmt: skip


def batch(stream: str, step: int, start: int, stop: int, bad: Collection[int] = ()) -> Batch:
    """Rows [start, stop) of a stream's global batch; the rows `bad` of pairs were replaced."""
    rows = range(start, stop)
    made = Batch(
        stream,
        step,
        start,
        stop,
        fields={
            "tokens": np.array([[step + row] * LENGTH for row in rows], np.int32),
            "used": np.array([1 + row % LENGTH for row in rows], np.int32),
        },
        weights=np.ones(len(rows), np.float32),
        sample_ids=np.array([step + row for row in rows], np.uint64),
        row_keys=np.array(rows, np.uint64),
        batch_digest=sum(digest_of(stream, step, row) for row in rows) & MASK,
        order_digest=sum(digest_of(stream, step + 1, row) for row in rows) & MASK,
    )
    for row in rows:
        source = source_of(step, row)
        made.samples[source] = made.samples.get(source, 0) + 1
        if row in bad and stream == "pairs":
            line = bad_line(stream, step, row)
            reasons = made.skipped.setdefault(source, {})
            reasons[line["reason"]] = reasons.get(line["reason"], 0) + 1
            made.bad.append(line)
    return made


def micro_batches(step: int, bad: Collection[int] = ()) -> dict[str, list[Batch]]:
    """This rank's rows of every stream: rank 0 in one micro-batch, the others in one of one row and one of the rest."""
    start, stop = rank() * ROWS // world_size(), (rank() + 1) * ROWS // world_size()
    cuts = [start, stop] if rank() == 0 else [start, start + 1, stop]
    pieces = list(pairwise(cuts))
    return {stream: [batch(stream, step, *piece, bad) for piece in pieces] for stream in STREAMS}


class Objective(base.Objective):
    """Loss of a row: the sum of its tokens. It is NaN at the rows `nan` of pairs in `nan_steps`."""

    main = "pairs"
    streams = STREAMS

    def __init__(self, nan: Collection[int] = (), nan_steps: Collection[int] = (2,)) -> None:
        self.model = torch.nn.Identity()
        self.nan = [(step, row) for step in nan_steps for row in nan]

    def loss_denominator(self, stream: str, batch: Batch) -> float:
        return count_rows(batch) if stream == "pairs" else count_targets(batch)

    def loss(self, forward: Any, stream: str, rows: DeviceBatch, loss_denominator: float) -> Loss:
        values = rows.tokens.float().sum(1)
        for step, row in self.nan:
            if stream == "pairs":
                values[(rows.keys == row) & (rows.sample_ids == step + row)] = torch.nan
        total = part_of_global_mean(values.sum(), loss_denominator)
        return Loss(total, {f"loss/{stream}": total})


class Engine:
    """Counts what it is asked for; `save` writes a file of this rank."""

    def __init__(self) -> None:
        self.updates = self.backwards = self.discarded = 0
        self.module = torch.nn.Identity()

    def train(self, mode: bool = True) -> None: ...

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        yield

    def backward(self, loss: Tensor) -> None:
        self.backwards += 1

    def step(self, rate: float) -> float:
        self.updates += 1
        return 1.5

    def discard(self) -> None:
        self.discarded += 1

    def non_finite_gradients(self) -> set[str]:
        return set()

    def save(self, folder: Path, tag: str) -> None:
        (folder / tag).mkdir(exist_ok=True)
        (folder / tag / f"rank_{rank()}.pt").write_bytes(f"weights after {self.updates}".encode())


class Loader:
    """Serves the steps; raises `failure` at step `fails`, and sets the signal of `stop` while it makes step `stops`."""

    wait_seconds = 0.0

    def __init__(
        self,
        bad: Collection[int] = (),
        fails: int = -1,
        failure: Exception | None = None,
        stop: Any = None,
        stops: int = -1,
    ) -> None:
        self.bad, self.fails, self.failure, self.stop, self.stops = bad, fails, failure, stop, stops

    def steps(self, first: int, last: int) -> Iterator[dict[str, list[Batch]]]:
        for step in range(first, last):
            if step == self.stops:
                self.stop.signal_name = "SIGTERM"
            if step == self.fails and self.failure is not None:
                raise self.failure
            yield micro_batches(step, self.bad)

    def close(self) -> None: ...


def trainer(
    folder: Path,
    *,
    nan: Collection[int] = (),
    nan_steps: Collection[int] = (2,),
    max_skipped: int = 3,
    bad: Collection[int] = (),
    fails: int = -1,
    failure: Exception | None = None,
    stops: int = -1,
    hours: float | None = None,
    max_bad_in_shard: int = 1000,
    save_every: int = 1000,
    previous_state: dict[str, Any] | None = None,
    evaluate_every: int | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    eval_failed: dict[str, str] | None = None,
) -> tuple[Trainer, Engine]:
    """A trainer of STEPS steps in the stage folder `folder`, and its engine. See `Objective` and `Loader`."""
    stop, engine = SimpleNamespace(signal_name=None), Engine()
    sources = {"even": None, "odd": None}
    stage: Any = SimpleNamespace(
        data={name: SimpleNamespace(sources=sources, image=None) for name in STREAMS},
        loader=SimpleNamespace(max_bad_fraction=1.0, max_bad_in_shard=max_bad_in_shard),
        schedule=Schedule(kind="constant"),
        train=SimpleNamespace(max_skipped=max_skipped),
        eval=SimpleNamespace(tasks=lambda: [("perplexity", "held", "x")] if evaluate else []),
        engine=SimpleNamespace(zero=1),
        checkpoint=SimpleNamespace(keep=2),
    )
    plan = Plan(
        STEPS, warmup=0, peak_rate=0.1, save_every=save_every, evaluate_every=evaluate_every, hours=hours
    )
    runtime = Runtime(rank(), world_size(), rank(), torch.device("cpu"))
    loader: Any = Loader(bad, fails, failure, stop, stops)
    made = Trainer(
        stage, folder, Objective(nan, nan_steps), engine, loader, plan, runtime, stop,  # type: ignore[arg-type]
        lambda step: {"at": step}, lambda: ((evaluate or dict)(), eval_failed or {}), previous_state,
    )  # fmt: skip
    return made, engine
