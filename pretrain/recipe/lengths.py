"""Durations in steps: training, warm-up, evaluation and checkpoint intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Protocol

from data_pipeline.errors import UserError
from data_pipeline.order.batch_schedule import BatchSchedule
from pretrain.recipe.fields import Length
from pretrain.recipe.schema import TrainStage


class HasEnds(Protocol):
    """The steps at which a stream and its sources end; see data_pipeline.order.stream_order.StreamOrder."""

    ends: dict[str, int]
    last_step: int | None


class HasSteps(Protocol):
    """Converts samples to steps: a BatchSchedule, or a StreamOrder.

    After an accepted change, a StreamOrder includes the earlier batch sizes.
    """

    def steps(self, samples: int) -> int: ...


def main_stream(stage: TrainStage) -> str:
    """The stream whose samples and epochs measure the training: the first with images, else the first."""
    with_images = [name for name, stream in stage.data.items() if stream.image is not None]
    return (with_images or list(stage.data))[0]


def train_length(stage: TrainStage) -> Length:
    """`train.steps`, `train.samples` or `train.epochs` as one Length."""
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
    """Number of steps that cover `length`, rounded up. `samples_per_epoch` is only needed for epochs.

    Raises UserError for epochs without `samples_per_epoch`.
    """
    schedule: HasSteps = BatchSchedule.of(batch) if isinstance(batch, int | Mapping) else batch
    value = Fraction(repr(length.value))  # 0.1 epochs of 30 samples are 3 samples, not 3.0000000000000004
    if length.unit == "steps":
        return math.ceil(value)
    if length.unit == "samples":
        return schedule.steps(math.ceil(value))
    if samples_per_epoch is None:
        raise UserError(
            f"{length}: the length of an epoch is unknown until the sources are open; write steps or samples"
        )
    return schedule.steps(math.ceil(value * samples_per_epoch))


def total_steps(
    stage: TrainStage, samples_per_epoch: int | None = None, converter: HasSteps | None = None
) -> int:
    """Number of steps of the stage, at least 1, measured on its main stream.

    `converter` converts samples to steps; by default the recipe's batch schedule does.
    """
    batches = stage.data[main_stream(stage)].batches
    return max(1, length_steps(train_length(stage), converter or batches, samples_per_epoch))


def check_ends(orders: Mapping[str, HasEnds], total: int) -> list[str]:
    """One line for each source that ends before the training does.

    Raises UserError if all sources of a stream end before `total` steps.
    """
    for name, order in orders.items():
        if order.last_step is not None and order.last_step < total:
            raise UserError(
                f"data.{name}.sources: all sources reach their max_epochs after {order.last_step} steps, but the "
                f"training takes {total}; write train.steps={order.last_step} or less, raise max_epochs, or remove "
                "it from one source"
            )
    return [
        f"data.{name}.sources.{source}: reaches its max_epochs after {step} of {total} steps; then the other "
        "sources share its rows"
        for name, order in orders.items()
        for source, step in order.ends.items()
        if step < total
    ]


def length_warnings(stage: TrainStage) -> list[str]:
    """Lengths that are valid but probably a mistake: a warm-up longer than the training."""
    warmup, length = stage.schedule.warmup, train_length(stage)
    batch = stage.data[main_stream(stage)].batches
    # If both are in epochs, any epoch size gives the same comparison; if only one is, the epoch size is unknown.
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
