"""Where a value that is not finite comes from: the place where the test has put it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.batches.spec import Batch
from pretrain.distributed import engine as real
from pretrain.objectives import base
from pretrain.objectives.base import Loss
from pretrain.train.non_finite import Origin, find_origin
from tests.pretrain.train.test_evaluation_modes import PlainEngine


class Block(nn.Module):
    """A linear layer that returns a mapping, as the towers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"hidden": (self.outer(torch.tanh(self.inner(x))), 7)}


class NoGradient(torch.autograd.Function):
    """The identity, with a gradient of NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.full_like(gradients[0], math.nan)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()
        self.scale = nn.Parameter(torch.ones(1))
        self.cut = ""

    def forward(self, x: Tensor) -> Tensor:
        for name in ("first", "second"):
            x = getattr(self, name)(x)["hidden"][0]
            if self.cut == name:
                x = NoGradient.apply(x)
        return NoGradient.apply(x * self.scale) if self.cut == "scale" else x * self.scale


class Objective(base.Objective):
    """Two streams; the loss of `captions` is infinite if `spoilt`."""

    main, streams = "captions", ("text", "captions")

    def __init__(self, spoilt: bool = False) -> None:
        torch.manual_seed(0)
        self.model = Model()
        self.spoilt = spoilt

    def loss(self, forward: Any, stream: str, rows: Any, loss_denominator: float) -> Loss:
        total = forward(x=rows.x).square().sum() / loss_denominator
        return Loss(total + math.inf if self.spoilt and stream == "captions" else total, {})

    def loss_denominator(self, stream: str, batch: Batch) -> float:
        return 1.0


class Engine(PlainEngine):
    """Real gradients; `discard` drops them."""

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def non_finite_gradients(self) -> set[str]:
        found = ((name, p.grad) for name, p in self.module.named_parameters())
        return {name for name, grad in found if grad is not None and not torch.isfinite(grad).all()}

    def discard(self) -> None:
        self.optimizer.zero_grad()


def origin(objective: Objective, bad_stream: str = "") -> Origin | None:
    """`bad_stream`: the second of its two micro-batches has an infinite value."""

    def rows_of(stream: str) -> list[Any]:
        values = [torch.ones(2, 3), torch.ones(2, 3)]
        if stream == bad_stream:
            values[1][0, 0] = math.inf
        return [SimpleNamespace(x=each) for each in values]

    engine: Any = Engine(objective.model)
    found = find_origin(engine, objective, rows_of, {"text": 4.0, "captions": 4.0})
    assert all(p.grad is None for p in objective.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in objective.model.modules())
    return found


def test_finite_values_have_no_origin() -> None:
    assert origin(Objective()) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["first.inner", "first.outer", "second.inner"])
def test_the_first_module_with_such_an_output_is_named(name: str, value: float) -> None:
    objective = Objective()
    with torch.no_grad():
        objective.model.get_submodule(name).bias[1] = value
    found = origin(objective)
    # tanh turns an infinity into 1, and the run goes on
    assert found == Origin("text", "output", name)
    assert str(found) == f"first in the output of {name}, stream text"


def test_the_stream_whose_rows_are_not_finite_is_named() -> None:
    assert origin(Objective(), "captions") == Origin("captions", "output", "first.inner")


def test_a_loss_whose_model_is_finite_is_named_by_its_stream() -> None:
    found = origin(Objective(spoilt=True))
    assert found == Origin("captions", "loss", None)
    assert str(found) == "first in the loss, stream captions"


@pytest.mark.parametrize(
    ("cut", "module"), [("first", "first.outer"), ("second", "second.outer"), ("scale", "second.outer")]
)
def test_a_gradient_is_named_by_the_module_that_a_backward_reaches_first(cut: str, module: str) -> None:
    """The model's own parameter `scale` has no module below the model: its place in the forward is unknown."""
    objective = Objective()
    objective.model.cut = cut
    assert origin(objective) == Origin("text", "gradient", module)


def test_a_gradient_of_the_models_own_parameter_alone_is_named_by_the_parameter() -> None:
    objective = Objective()
    objective.model.scale.register_hook(lambda gradient: gradient * math.nan)
    assert origin(objective) == Origin("text", "gradient", "scale")


def test_parameters_with_a_gradient_that_is_not_finite_are_named() -> None:
    engine = real.Engine.__new__(real.Engine)
    engine.module = torch.nn.Sequential(*(torch.nn.Linear(2, 3) for _ in range(3)))
    for number, value in enumerate((1.0, float("nan"), float("-inf"))):
        weight = engine.module[number].weight
        weight.grad = torch.ones_like(weight)
        weight.grad[2, 1] = value
    assert engine.non_finite_gradients() == {"1.weight", "2.weight"}
