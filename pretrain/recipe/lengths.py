"""Lengths in steps: how long a stage trains, and when its warm-up, evaluations and checkpoints fall."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Protocol

from data_pipeline.errors import UserError
from data_pipeline.order.batch_schedule import BatchSchedule
from pretrain.recipe.fields import Length
from pretrain.recipe.schema import TrainStage


class Ending(Protocol):
    """What a stream's order knows of its end; see data_pipeline.order.stream_order.StreamOrder."""

    ends: dict[str, int]
    last_step: int | None


class HasSteps(Protocol):
    """How many steps have so many samples; a StreamOrder knows also of the batches before an accepted change."""

    def steps(self, samples: int) -> int: ...


def main_stream(stage: TrainStage) -> str:
    """The stream that samples and epochs count: the first one with images, else the first one."""
    with_images = [name for name, stream in stage.data.items() if stream.image is not None]
    return (with_images or list(stage.data))[0]


def train_length(stage: TrainStage) -> Length:
    """`train.steps|samples|epochs` as one Length."""
    train = stage.train
    if train.steps is not None:
        return Length(value=float(train.steps), unit="steps")
    if train.samples is not None:
        return Length(value=float(train.samples), unit="samples")
    if train.epochs is not None:
        return Length(value=train.epochs, unit="epochs")
    raise UserError("train: write exactly one of steps, samples, epochs")


def length_steps(
    length: Length, batch: int | Mapping[int, int] | HasSteps, samples_per_epoch: int | None = None
) -> int:
    """Steps that cover `length`, rounded up; `samples_per_epoch` is needed for epochs alone."""
    rows: HasSteps = BatchSchedule.of(batch) if isinstance(batch, int | Mapping) else batch
    value = Fraction(repr(length.value))  # 0.1 epochs of 30 samples are 3 samples, not 3.0000000000000004
    if length.unit == "steps":
        return math.ceil(value)
    if length.unit == "samples":
        return rows.steps(math.ceil(value))
    if samples_per_epoch is None:
        raise UserError(
            f"{length}: how long an epoch is, is known only once the sources are open; write steps or samples"
        )
    return rows.steps(math.ceil(value * samples_per_epoch))


def total_steps(stage: TrainStage, samples_per_epoch: int | None = None, rows: HasSteps | None = None) -> int:
    """Steps of the whole stage; samples and epochs are those of its main stream, `rows` by default as in the recipe."""
    batches = stage.data[main_stream(stage)].batches
    return max(1, length_steps(train_length(stage), rows or batches, samples_per_epoch))


def check_ends(orders: Mapping[str, Ending], total: int) -> list[str]:
    """A line for every source that ends before the training does; UserError if a whole stream would."""
    for name, order in orders.items():
        if order.last_step is not None and order.last_step < total:
            raise UserError(
                f"data.{name}.sources: all of them reach their max_epochs after {order.last_step} steps, the training "
                f"takes {total}; write train.steps={order.last_step} or less, raise max_epochs, or leave it out of a "
                "source that may go on"
            )
    return [
        f"data.{name}.sources.{source}: reaches its max_epochs after {step} of {total} steps; then the other "
        "sources share its rows"
        for name, order in orders.items()
        for source, step in order.ends.items()
        if step < total
    ]


def warns(stage: TrainStage) -> list[str]:
    """What is allowed but hardly meant."""
    warmup, length = stage.schedule.warmup, train_length(stage)
    batch = stage.data[main_stream(stage)].batches
    # One epoch cancels out of the comparison when both are in epochs, and is unknown when one is.
    epoch = 10**9 if warmup.unit == length.unit == "epochs" else None
    if "epochs" in (warmup.unit, length.unit) and epoch is None:
        return []
    steps, total = length_steps(warmup, batch, epoch), length_steps(length, batch, epoch)
    if steps <= total:
        return []
    return [
        f"schedule.warmup ({warmup}) is longer than the training ({length}): "
        "the learning rate never reaches its peak; set schedule.warmup as well"
    ]
