"""`dromos merge`: what a person types, passed on to pretrain.merge, with a progress bar."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from launch.cli.merging import flags

Out = Annotated[
    str | None,
    typer.Option("--out", metavar="DIR", help="The folder or s3:// URL to write; it appears when complete."),
]
FEW = 4
"""inputs that the end of a merge tells with their weights: who swapped two sees it"""
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")]


def merge(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="A B [C]...",
            help="RUN/STAGE[@STEP|@latest|@best], a folder or file of weights, a DeepSpeed checkpoint, s3://, hf://.",
        ),
    ] = None,
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
    out: Out = None,
    dtype: flags.Dtype = None,
    max_shard_size: flags.ShardSize = None,
    durable: Annotated[
        bool,
        typer.Option("--durable", help="Wait for the disk before DIR appears: whole after a power cut too."),
    ] = False,
    dry_run: DryRun = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --dry-run: the plan as JSON; else the record of the merge.")
    ] = False,
) -> None:
    """Interpolate two checkpoints, average several, or add up differences.

    theta = beta * A + (1 - beta) * B, or the weighted mean. beta is the weight of the FIRST input (other tools
    mean the second's, their t); beta 1 gives A, byte for byte. Sums are exact to one rounding. Reads ZeRO 0-3
    checkpoints in place from their fp32 shards, needs no torch, and takes the same memory whatever the size.
    Running it again says what is done; another merge into DIR is refused.

    \b
    Examples:
      dromos merge runs/demo/sphinx/real runs/demo/sphinx/synthetic --beta 0.4 --out mix
      dromos merge A B C --method soup --out soup
      dromos merge A B --beta 0.5 --only '^llm\\.' --copy-rest B --out mix --dry-run
      dromos merge A B --method ties --base C --density 0.5 --out ties
      dromos merge --window runs/r/real,last=8,schedule=1-sqrt --out mean
      dromos merge --spec mergekit.yml --out merged

    Exit codes: 0 done; 2 your input is wrong; 75 stopped, the same command goes on; 1 anything else.
    """
    import json
    from os.path import expanduser

    from data_pipeline.errors import UserError
    from launch.cli.base import resumable
    from launch.cli.progress_bar import counting
    from pretrain.merge.execute import execute
    from pretrain.merge.output.overflow import note as overflow_note
    from pretrain.merge.planning.describe import as_json as plain
    from pretrain.merge.planning.describe import cost, formula, lines, summary
    from pretrain.merge.planning.output_layout import parse_size
    from pretrain.merge.spec import load_spec, prepare_spec

    asked = {
        "beta": beta, "weights": weights, "method": method, "base": base, "lambda": lambda_, "density": density,
        "t": t, "normalize": normalize, "window": window, "only": only, "exclude": exclude,
        "copy_rest": copy_rest, "vocabulary": vocabulary, "dtype": dtype,
    }  # fmt: skip
    if spec is not None:
        named = asked | {"rule": rule or None, "layers": layers, "curve": curve, "A B": inputs or None}
        if given := [name for name, value in named.items() if value is not None]:
            raise UserError(
                f"--spec says it all; leave {', '.join(given).replace('_', '-')} out, or write it there"
            )
        wanted = load_spec(spec)
    else:
        wanted = flags.spec_of(inputs, rule, layers, curve, **asked)
    made, opened = prepare_spec(wanted, parse_size(max_shard_size) if max_shard_size else None, seed)
    if dry_run:
        needs = cost(made, opened.sources)
        told = json.dumps(plain(made) | {"cost": asdict(needs)}, indent=1)
        typer.echo(told if as_json else "\n".join([*lines(made), *needs.lines()]))
        return
    if out is None:
        raise UserError("--out DIR is missing: where to write (or --dry-run to see the plan)")
    out = expanduser(out)
    for note in made.notes:
        typer.echo(f"note: {note}", err=True)
    with resumable(), counting("merging", made.size) as bar:
        (record,) = execute([made], opened, [out], progress=bar.add, durable=durable)
    if (said := overflow_note({out: record})) is not None:
        typer.echo(f"note: {said}", err=True)
    if as_json:
        typer.echo(json.dumps(record, indent=1))
        return
    if bar.moved and len(made.weights) in range(1, FEW + 1):
        typer.echo(f"{out} = {formula(made, addresses=True)}")
    typer.echo(f"{out}: {summary(made)}" if bar.moved else f"{out}: done before, left as it is")


def register(app: typer.Typer) -> None:
    """Add the command to `dromos`."""
    app.command()(merge)
