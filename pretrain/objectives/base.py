"""The interface that the training loop needs from an objective: streams, loss denominators, losses, metrics.

`Objective` is for losses of each row by itself, `GlobalObjective` for losses that compare the rows of all ranks. The
loop calls `backward` of both, evaluation and export ask for what they need by name (`predict`, `exports`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from data_pipeline.batches.spec import Batch
from pretrain.objectives.device_batch import DeviceBatch

# The model's forward: the engine in training, the module itself elsewhere. What it takes and gives is between an
# objective and its model.
Forward = Callable[..., Any]


class Embed(Protocol):
    """`predict["embed"]`: features of images, of captions, or both."""

    def __call__(
        self, forward: Forward, images: Tensor | None = None, tokens: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`images`: normalised `[rows, 3, size, size]`; `tokens`: int64 `[rows, length]`.

        Returns `image` and `text`, `[rows, width]`, L2-normalised, each if its input is given.
        """


class TokenNll(Protocol):
    """`predict["nll"]`: negative log-likelihood of tokens."""

    def __call__(self, forward: Forward, rows: DeviceBatch) -> tuple[Tensor, Tensor]:
        """The sum over the target tokens of each row, in nats, fp32 `[rows]`, and their number, int64 `[rows]`."""


class Generate(Protocol):
    """`predict["generate"]`: tokens behind the images of rows."""

    def __call__(self, rows: DeviceBatch, start: int, end: int, max_tokens: int) -> list[list[int]]:
        """At most `max_tokens` token ids of each row, without the ids `start` and `end`."""


class Backward(Protocol):
    """What `Objective.backward` needs of the engine: a forward, and a backward pass of a part of the step's loss."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def backward(self, loss: Tensor) -> None: ...


@dataclass(frozen=True)
class Loss:
    """The loss of one micro-batch.

    total: its sum over all streams, micro-batches and ranks is the step's loss; it is what the backward pass starts at.
    parts: detached scalars by name; their sums over all micro-batches and ranks are in metrics.jsonl.
    """

    total: Tensor
    parts: dict[str, Tensor]


class Objective(ABC):
    """A training objective: its model, and the conversion from batches to losses.

    model:   the module that the engine trains
    main:    name of the stream whose samples measure the length of the training
    streams: streams of every step in the order of their backward passes, which must be the same on every rank
    exports: names of the formats in which the model can be exported (pretrain/export)
    """

    model: nn.Module
    main: str
    streams: tuple[str, ...]
    exports: tuple[str, ...] = ()

    @property
    def predict(self) -> Mapping[str, Callable[..., object]]:
        """What the model can be asked for, by name; an evaluation looks up what it needs and skips the task otherwise.

        `embed` is an Embed, `nll` a TokenNll, `generate` a Generate; an objective and its evaluations may agree on
        others.
        """
        return {}

    @abstractmethod
    def loss_denominator(self, stream: str, batch: Batch) -> float:
        """One micro-batch's part of the denominator of the stream's loss, in rows or tokens: an integer.

        A row of weight 1 should count at least 1, because the total of a stream must not be 0. `StepTotals` sums the
        parts of all micro-batches and ranks before the forward pass.
        """

    @abstractmethod
    def loss(self, forward: Forward, stream: str, rows: DeviceBatch, loss_denominator: float) -> Loss:
        """The loss of one micro-batch, divided by `loss_denominator`, the stream's total over the global batch."""

    def backward(
        self, engine: Backward, stream: str, micro_batches: Collection[DeviceBatch], loss_denominator: float
    ) -> dict[str, Tensor]:
        """Forward and backward passes of a stream's micro-batches of one step; returns the sums of the loss's parts.

        `loss` is among them. `micro_batches` may be iterated several times. Every rank must make the same number of
        passes.
        """
        parts: dict[str, Tensor] = {}
        for rows in micro_batches:
            loss = self.loss(engine, stream, rows, loss_denominator)
            engine.backward(loss.total)
            add_parts(parts, loss)
        return parts

    def metrics(self, batches: Mapping[str, Sequence[Batch]], device: torch.device) -> dict[str, float]:
        """Other scalars of the step for metrics.jsonl, equal on all ranks; `batches` are this rank's, by stream."""
        return {}

    def frozen(self) -> dict[str, Tensor]:
        """Named tensors that the stage uses but does not train; they go into frozen.safetensors."""
        fixed = {name: p.detach() for name, p in self.model.named_parameters() if not p.requires_grad}
        # A tied parameter has several names and is saved under the first.
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return fixed | {name: t for name, t in self.model.state_dict().items() if name not in parameters}

    def visual_tokens(self, stream: str) -> int:
        """Tokens that images add to a row of a stream in front of its text."""
        return 0

    @property
    def max_length(self) -> int | None:
        """Largest number of tokens of a row, visual ones included; None for no limit beyond the stream's own."""
        return None


class GlobalObjective(Objective):
    """An objective whose loss compares rows of the whole global batch, such as a contrastive loss.

    With one micro-batch, features, loss and backward are one graph. With several, features are cached (GradCache, Gao
    et al. 2021): all micro-batches run without gradient, the loss of all features gives the gradient of each feature,
    and each micro-batch runs again to carry its part into the weights. The keys of the rows decide all masks, so both
    runs see the same ones; loss and gradients are those of one micro-batch up to rounding.
    """

    @abstractmethod
    def features(self, forward: Forward, stream: str, rows: DeviceBatch) -> dict[str, Tensor]:
        """What the loss needs of a micro-batch, by name.

        Per-row tensors `[rows, ...]`, also integers such as sample ids; and 0-dim tensors that are the model's own,
        such as a temperature, and the same for all micro-batches.
        """

    @abstractmethod
    def global_loss(self, stream: str, features: Mapping[str, Tensor], loss_denominator: float) -> Loss:
        """This rank's part of the loss; `features` are those of all its micro-batches, in the order of the rows."""

    def loss(self, forward: Forward, stream: str, rows: DeviceBatch, loss_denominator: float) -> Loss:
        return self.global_loss(stream, self.features(forward, stream, rows), loss_denominator)

    def backward(
        self, engine: Backward, stream: str, micro_batches: Collection[DeviceBatch], loss_denominator: float
    ) -> dict[str, Tensor]:
        if len(micro_batches) == 1:
            return super().backward(engine, stream, micro_batches, loss_denominator)
        with torch.no_grad():
            cached = [self.features(engine, stream, rows) for rows in micro_batches]
        leaves: dict[str, Tensor] = {}
        for name, first in cached[0].items():
            value = first if first.dim() == 0 else torch.cat([features[name] for features in cached])
            leaves[name] = value.detach().requires_grad_(value.is_floating_point())
        del cached
        loss = self.global_loss(stream, leaves, loss_denominator)
        learnt = [name for name, value in leaves.items() if value.requires_grad]
        found = torch.autograd.grad(loss.total, [leaves[name] for name in learnt])
        gradients = dict(zip(learnt, found, strict=True))
        start = 0
        for rows in micro_batches:
            features = self.features(engine, stream, rows)
            # The scalar product with the features has the gradient of the loss. What is shared counts once.
            products = [
                (
                    features[name]
                    * (gradient if gradient.dim() == 0 else gradient[start : start + len(rows)])
                ).sum()
                for name, gradient in gradients.items()
                if gradient.dim() > 0 or start == 0
            ]
            part = torch.stack([product.float() for product in products]).sum() if products else None
            if (
                part is not None and part.requires_grad
            ):  # not if only what is shared trains, on every rank alike
                engine.backward(part)
            start += len(rows)
        return add_parts({}, loss)


def add_parts(parts: dict[str, Tensor], loss: Loss) -> dict[str, Tensor]:
    """The sums of the step's parts with those of one more loss."""
    for name, value in {"loss": loss.total.detach(), **loss.parts}.items():
        parts[name] = parts[name] + value if name in parts else value
    return parts
