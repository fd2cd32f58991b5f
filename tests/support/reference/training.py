"""The training loop of the reference: schedule, clipping and AdamW by formula, in one process, in float64."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tests.support.reference.rows import Row, batch_schedule

# Vectors, norms, biases, the logit scale and single learned tokens do not decay: by name, not by shape.
NOT_DECAYED = re.compile(
    r"(.*\.)?(bias|in_proj_bias|class_embedding|logit_scale|start_image|end_image"
    r"|(ln_\w+|norm|\w+layernorm|connector\.0\.norm)\.weight)"
)


class Objective(Protocol):
    main: str
    rows: dict[str, list[list[Row]]]

    def losses(self, weights: Mapping[str, Tensor], step: int) -> tuple[Tensor, dict[str, float]]: ...

    def figures(self, step: int) -> dict[str, float]: ...

    def is_frozen(self, name: str) -> bool: ...

    def evaluate(self, weights: Mapping[str, Tensor]) -> dict[str, float]: ...


@dataclass
class Trained:
    """What a run should have computed.

    steps:           rows of metrics.jsonl, without times
    replaced:        step, row, attempt, source, key and reason of every line of bad_samples.jsonl
    first_gradients: of the first step by name, before clipping
    weights:         by name, after the last step, also frozen ones
    first, second:   AdamW's moments by name, after the last step
    """

    steps: list[dict[str, Any]]
    replaced: list[list[Any]]
    first_gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]


def train(recipe: dict[str, Any], objective: Objective, initial: Mapping[str, Tensor], steps: int) -> Trained:
    """Train `steps` steps from the weights `initial`."""
    settings = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "clip": 1.0, **recipe["optimizer"]}
    weights = {name: tensor.double().clone() for name, tensor in initial.items()}
    trained = [name for name in weights if not objective.is_frozen(name)]
    for name in trained:
        weights[name].requires_grad_()
    first = {name: torch.zeros_like(weights[name]) for name in trained}
    second = {name: torch.zeros_like(weights[name]) for name in trained}
    found = Trained([], [], {}, weights, first, second)
    for step in range(steps):
        loss, parts = objective.losses(weights, step)
        gradients = torch.autograd.grad(loss, [weights[name] for name in trained])
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        limit = settings["clip"] or math.inf
        factor = min(1.0, limit / norm) if norm else 1.0
        rate = learning_rate(recipe, objective.main, step, steps)
        with torch.no_grad():
            for name, gradient in zip(trained, gradients, strict=True):
                adamw(weights[name], gradient * factor, first[name], second[name], name, step, rate, settings)
        if step == 0:
            found.first_gradients = dict(zip(trained, gradients, strict=True))
        row: dict[str, Any] = {"step": step + 1, "loss": float(loss.detach()), **parts}
        row |= objective.figures(step) | {"lr": rate, "grad_norm": norm} | counts(objective, step)
        every = recipe.get("eval", {}).get("every", steps)
        if (step + 1) % every == 0 or step + 1 == steps:
            with torch.no_grad():
                evaluated = objective.evaluate(weights)
            row |= {"eval": evaluated} if evaluated else {}
        found.steps.append(row)
        found.replaced += replaced(objective, step)
    return found


def adamw(
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, name: str, step: int, rate: float,
    settings: Mapping[str, Any],
) -> None:  # fmt: skip
    """One update in place (Loshchilov and Hutter 2019, algorithm 2, with the decay times the learning rate)."""
    one, two = settings["betas"]
    first.mul_(one).add_((1 - one) * gradient)
    second.mul_(two).add_((1 - two) * gradient.square())
    unbiased_first, unbiased_second = first / (1 - one ** (step + 1)), second / (1 - two ** (step + 1))
    decay = 0.0 if NOT_DECAYED.fullmatch(name) else settings["weight_decay"]
    weight -= rate * (decay * weight + unbiased_first / (unbiased_second.sqrt() + settings["eps"]))


def learning_rate(recipe: dict[str, Any], main: str, step: int, steps: int) -> float:
    """The schedule of docs/recipes.md and pretrain/recipe/schema.py, for a warm-up in steps or samples of `main`."""
    schedule, optimizer = recipe["schedule"], recipe["optimizer"]
    batch = batch_schedule(recipe["data"][main])
    peak = optimizer["lr"] if "lr" in optimizer else optimizer["lr_per_256"] * max(batch.values()) / 256
    amount, _, unit = str(schedule.get("warmup", 0)).partition(" ")
    warmup = int(amount)
    if unit == "samples":
        served, wanted, warmup = 0, warmup, 0
        while served < wanted:
            served += batch[max(first for first in batch if first <= warmup)]
            warmup += 1
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    share = (step - warmup) / (steps - warmup)
    kind, final = schedule.get("kind", "cosine"), schedule.get("final_lr", 0.0)
    left = {"cosine": (1 + math.cos(math.pi * share)) / 2, "linear": 1 - share, "constant": 1.0}[kind]
    return peak if kind == "constant" else final + (peak - final) * left


def counts(objective: Objective, step: int) -> dict[str, Any]:
    """Rows by stream, replaced samples by source and reason, and both digests of a step."""
    rows = [row for of_stream in objective.rows.values() for row in of_stream[step]]
    skipped: dict[str, Counter[str]] = {}
    for row in rows:
        for _, reason in row.attempts:
            skipped.setdefault(row.sample[0], Counter())[reason] += 1
    return {
        "samples": {name: len(steps[step]) for name, steps in objective.rows.items()},
        "skipped": {source: dict(reasons) for source, reasons in skipped.items()},
        "batch_digest": f"{sum(row.batch_digest for row in rows) % 2**64:016x}",
        "order_digest": f"{sum(row.order_digest for row in rows) % 2**64:016x}",
    }


def replaced(objective: Objective, step: int) -> list[list[Any]]:
    return [
        [step + 1, number, attempt, row.sample[0], key, reason]
        for of_stream in objective.rows.values()
        for number, row in enumerate(of_stream[step])
        for attempt, (key, reason) in enumerate(row.attempts)
    ]
