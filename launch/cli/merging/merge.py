"""`dromos merge`: interpolates checkpoints with pretrain.merge and shows progress."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from launch.cli.base import print_note
from launch.cli.merging import flags

if TYPE_CHECKING:
    from pretrain.merge.merge_plan import Plan
    from pretrain.merge.planning.inputs import OpenedInputs

# The report shows the weights of at most this many inputs, so that two swapped inputs are noticed.
MAX_SHOWN_INPUTS = 4


def merge(
    inputs: flags.MergeInputs = None,
    beta: flags.Beta = None,
    weights: flags.Weights = None,
    method: flags.Method = None,
    base: flags.Base = None,
    lambda_: flags.Lambda = None,
    density: flags.Density = None,
    t: flags.T = None,
    seed: flags.Seed = None,
    normalize: flags.Normalize = None,
    window: flags.Window = None,
    spec: flags.Spec = None,
    only: flags.Only = None,
    exclude: flags.Exclude = None,
    copy_rest: flags.CopyRest = None,
    rule: flags.Rule = None,
    layers: flags.Layers = None,
    curve: flags.Curve = None,
    vocabulary: flags.Vocabulary = None,
    key: flags.Key = None,
    out: flags.Out = None,
    dtype: flags.Dtype = None,
    max_shard_size: flags.ShardSize = None,
    durable: flags.Durable = False,
    dry_run: flags.DryRun = False,
    as_json: flags.MergeJson = False,
) -> None:
    """Interpolate two checkpoints, average several, or add up differences.

    theta = beta * A + (1 - beta) * B, or the weighted mean. beta is the weight of the FIRST input (in other tools, t
    is the weight of the second); beta 1 gives A, byte for byte. Sums are exact to one rounding. Reads ZeRO 0-3
    checkpoints in place from their fp32 shards, needs no torch, and uses the same memory for any model size.
    If DIR holds this merge already, nothing is written; another merge in DIR is an error.

    \b
    Examples:
      dromos merge runs/demo/sphinx/real runs/demo/sphinx/synthetic --beta 0.4 --out mix
      dromos merge A B C --method soup --out soup
      dromos merge A B --beta 0.5 --only '^llm\\.' --copy-rest B --out mix --dry-run
      dromos merge A B --method ties --base C --density 0.5 --out ties
      dromos merge --window runs/r/real,last=8,schedule=1-sqrt --out mean
      dromos merge --spec mergekit.yml --out merged

    Exit codes: 0 done; 2 your input is wrong; 75 stopped, the same command resumes; 1 anything else.
    """
    values = {
        "beta": beta, "weights": weights, "method": method, "base": base, "lambda": lambda_, "density": density,
        "t": t, "normalize": normalize, "window": window, "only": only, "exclude": exclude,
        "copy_rest": copy_rest, "vocabulary": vocabulary, "dtype": dtype,
    }  # fmt: skip
    plan, opened = plan_merge(values, inputs, rule, layers, curve, spec, max_shard_size, seed, key)
    text = plan_text(plan, opened, as_json) if dry_run else write_merge(plan, opened, out, durable, as_json)
    typer.echo(text)


def plan_merge(
    values: dict[str, Any],
    inputs: list[str] | None,
    rule: list[str] | None,
    layers: str | None,
    curve: str | None,
    spec_file: str | None,
    max_shard_size: str | None,
    seed: int | None,
    key: str | None = None,
) -> tuple[Plan, OpenedInputs]:
    """Plan the merge that the flags or the spec file describe. Raises UserError."""
    from pretrain.merge.planning.output_layout import parse_size
    from pretrain.merge.spec import prepare_spec

    if spec_file is not None:
        others = {"rule": rule or None, "layers": layers, "curve": curve, "A B": inputs or None}
        spec = flags.read_spec(spec_file, values | others)
    else:
        spec = flags.spec_of(inputs, rule, layers, curve, **values)
    return prepare_spec(spec, parse_size(max_shard_size) if max_shard_size else None, seed, key)


def plan_text(plan: Plan, opened: OpenedInputs, as_json: bool) -> str:
    """The dry run: the plan and its cost as text or JSON."""
    from pretrain.merge.planning import describe

    cost = describe.cost(plan, opened.sources)
    if as_json:
        return json.dumps(describe.as_json(plan) | {"cost": asdict(cost)}, indent=1)
    return "\n".join([*describe.lines(plan), *cost.lines()])


def write_merge(plan: Plan, opened: OpenedInputs, out: str | None, durable: bool, as_json: bool) -> str:
    """Write the merge to `out`; returns the report as text, or the record of the merge as JSON."""
    from os.path import expanduser

    from data_pipeline.errors import UserError
    from launch.cli.base import resumable
    from launch.cli.progress_bar import counting
    from pretrain.merge.execute import execute
    from pretrain.merge.output.overflow import overflow_warning
    from pretrain.merge.planning.describe import formula, summary

    if out is None:
        raise UserError("--out DIR is missing: the folder to write (or --dry-run to see the plan)")
    out = expanduser(out)
    for note in plan.notes:
        print_note(note)
    with resumable(), counting("merging", plan.size) as bar:
        (record,) = execute([plan], opened, [out], progress=bar.add, durable=durable)
    print_note(overflow_warning({out: record}))
    if as_json:
        return json.dumps(record, indent=1)
    if not bar.moved:
        return f"{out}: already complete; nothing was written"
    lines = [f"{out}: {summary(plan)}"]
    if len(plan.weights) in range(1, MAX_SHOWN_INPUTS + 1):
        lines.insert(0, f"{out} = {formula(plan, addresses=True)}")
    return "\n".join(lines)


def register(app: typer.Typer) -> None:
    """Add the command to `dromos`."""
    app.command()(merge)
