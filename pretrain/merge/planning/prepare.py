"""From a request to plans: open what it names, decide, plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from pretrain.merge.merge_plan import Plan, letter
from pretrain.merge.planning.planner import Planner
from pretrain.merge.planning.request import Request
from pretrain.merge.planning.rules import Rules
from pretrain.merge.vocabulary.align import aligned
from pretrain.weights.source import WeightSource, open_weights


@dataclass(frozen=True)
class Opened:
    """The sources of a merge: its inputs first, then whatever else it names.

    named: as it was written -> index. notes: what the plan should say of the sources.
    """

    sources: list[WeightSource]
    inputs: int
    named: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def open_inputs(
    inputs: Sequence[str], others: Sequence[str | None] = (), run_dir: Path | None = None
) -> Opened:
    """Open every address; each of `others` may be one of the inputs, their letter (A, B, ...), or another address."""
    addresses, named = list(inputs), {}
    for other in others:
        if other is None:
            continue
        number = ord(other) - ord("A") if len(other) == 1 else -1
        if other not in addresses and 0 <= number < len(inputs):
            named[other] = number
            continue
        if 0 <= number < 26 and other not in addresses and not Path(other).exists():
            last = letter(len(inputs) - 1)
            raise UserError(
                f"{other}: no such input; they are A to {last}, and there is nothing of that name"
            )
        if other not in addresses:
            addresses.append(other)
        named[other] = addresses.index(other)
    return Opened([open_weights(address, run_dir) for address in addresses], len(inputs), named)


def open_request(request: Request, run_dir: Path | None = None) -> Opened:
    """Open everything that a request names, vocabularies brought together as it asks.

    Raises UserError where embeddings of different vocabularies would be mixed and it does not say how.
    """
    copied = [rule.copy_from for rule in request.rules]
    opened = open_inputs(request.inputs, [request.base, request.copy_rest, *copied], run_dir)
    mixes = Rules(request).mixes
    return replace(opened, sources=aligned(opened.sources, request.vocabulary, mixes))


def replan(asked: dict[str, Any], run_dir: Path | None = None) -> tuple[Plan, Opened]:
    """The plan again from what a plan's `asked` and a record in merge.json say."""
    if "mergekit" in asked:
        from pretrain.merge.mergekit.plan import open_mergekit, plan_mergekit
        from pretrain.merge.mergekit.yaml_file import parse

        file = parse(asked["file"], asked["mergekit"])
        opened = open_mergekit(file, run_dir)
        return plan_mergekit(file, opened, asked["max_shard_size"], asked["seed"]), opened
    (plan,), opened = prepare(Request.from_plain(asked), run_dir=run_dir)
    return plan, opened


def prepare(
    request: Request, weights: Sequence[Sequence[float]] | None = None, run_dir: Path | None = None
) -> tuple[list[Plan], Opened]:
    """One plan a row of resolved weights (default: the request's own), all with the same tensors in the same places."""
    rows = [request.weights] if weights is None else weights
    opened = open_request(request, run_dir)
    active = [i for i in range(opened.inputs) if any(row[i] != 0 for row in rows)]
    planner = Planner(opened.sources, request, opened.named, active)
    return [planner.plan(row) for row in rows], opened
