"""`dromos merge` and `dromos sweep`: what a person types, passed on to pretrain.merge, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from launch import merge_flags as flags

Only = Annotated[
    str | None,
    typer.Option(
        "--only", metavar="REGEX", help="Mix only tensors in whose name this is found, such as '^llm\\.'."
    ),
]
CopyRest = Annotated[
    str | None,
    typer.Option("--copy-rest", metavar="WHOSE", help="Whose tensors the rest is: A, B, ... or an address."),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="The folder to write; it appears when complete.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", metavar="bf16|fp16|fp32", help="Type of the mixed tensors; default: as in the inputs."
    ),
]


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
    dry_run: DryRun = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --dry-run: the plan as JSON; else the record of the merge.")
    ] = False,
) -> None:
    """Merge checkpoints: interpolate two, average several, add differences to a base.

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
    """
    import json

    from data_pipeline.errors import UserError
    from pretrain.merge.cost import cost
    from pretrain.merge.describe import as_json as plain
    from pretrain.merge.describe import summary
    from pretrain.merge.layout import parse_size
    from pretrain.merge.spec import load_spec, prepare_spec
    from pretrain.merge.tool import execute

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
        typer.echo(told if as_json else "\n".join([*made.lines(), *needs.lines()]))
        return
    if out is None:
        raise UserError("--out DIR is missing: where to write (or --dry-run to see the plan)")
    for note in made.notes:
        typer.echo(f"note: {note}", err=True)
    with _bar("merging", made.size) as bar:
        (record,) = execute([made], opened, [out], progress=bar.add)
    if as_json:
        typer.echo(json.dumps(record, indent=1))
        return
    typer.echo(f"{out}: {summary(made)}" if bar.moved else f"{out}: done before, left as it is")


def sweep(
    a: Annotated[str, typer.Argument(metavar="A", help="An address, as for dromos merge.")],
    b: Annotated[str, typer.Argument(metavar="B", help="An address, as for dromos merge.")],
    betas: Annotated[
        str,
        typer.Option("--betas", metavar="START:STOP:STEP", help="Both ends included; or a list, 0,0.5,1."),
    ] = "0:1:0.1",
    only: Only = None,
    copy_rest: CopyRest = None,
    out: Out = None,
    dtype: Dtype = None,
    dry_run: DryRun = False,
) -> None:
    """Merge two checkpoints at many betas in one pass.

    theta = beta * A + (1 - beta) * B for each. Writes DIR/beta-0.30/ and so on, each as dromos merge would, and
    DIR/sweep.json. A and B are read once for all. Outputs that are complete are passed over.

    \b
    Example:
      dromos sweep runs/demo/sphinx/real runs/demo/sphinx/synthetic --betas 0:1:0.1 --out sweep
    """
    from data_pipeline.errors import UserError
    from pretrain.merge import parse_betas
    from pretrain.merge.sweep import folder_names, plan_sweep, write_sweep

    numbers = parse_betas(betas)
    plans, opened = plan_sweep(a, b, numbers, only=only, copy_rest=copy_rest, dtype=dtype)
    if dry_run:
        typer.echo("\n".join(plans[len(plans) // 2].lines()))
        typer.echo(f"and so for {len(numbers)} betas: {', '.join(folder_names(numbers))}")
        return
    if out is None:
        raise UserError("--out DIR is missing: where to write (or --dry-run to see the plan)")
    with _bar("sweeping", sum(plan.size for plan in plans)) as bar:
        folders = write_sweep(plans, opened, numbers, out, progress=bar.add)
    for beta, folder in folders.items():
        typer.echo(f"beta {beta:g}: {folder}")
    if not bar.moved:
        typer.echo("done before, left as they are")


def register(app: typer.Typer) -> None:
    """Add both commands to the `dromos` command."""
    app.command()(merge)
    app.command()(sweep)


class _Bar:
    """Counts bytes written and shows them."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.moved = 0
        self._advance = advance

    def add(self, count: int) -> None:
        self.moved += count
        self._advance(count)


@contextmanager
def _bar(what: str, total: int) -> Iterator[_Bar]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield _Bar(lambda count: progress.advance(task, count))
