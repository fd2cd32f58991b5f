"""`dromos merge` and `dromos sweep`: what a person types, passed on to pretrain.merge, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="A B [C]...",
        help="RUN/STAGE[@STEP|@latest|@best], a folder or file of safetensors, a DeepSpeed checkpoint, hf://.",
    ),
]
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
    inputs: Inputs,
    beta: Annotated[
        float | None, typer.Option("--beta", metavar="NUMBER", help="Weight of A, from 0 to 1.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", metavar="W,W[,W]...", help="One share for each input, divided by their sum."
        ),
    ] = None,
    only: Only = None,
    copy_rest: CopyRest = None,
    out: Out = None,
    dtype: Dtype = None,
    dry_run: DryRun = False,
) -> None:
    """Interpolate checkpoints, or average several.

    theta = beta * A + (1 - beta) * B, or the weighted mean. beta is the weight of the FIRST input (other tools
    mean the second's); beta 1 gives A, byte for byte. Sums are exact to one rounding. Reads ZeRO 0-3 checkpoints
    in place from their fp32 shards, needs no torch, and takes the same memory whatever the size. Running it again
    says what is done; another merge into DIR is refused.

    \b
    Examples:
      dromos merge runs/demo/sphinx/real runs/demo/sphinx/synthetic --beta 0.4 --out mix
      dromos merge A B C --weights 1,2,1 --out soup
      dromos merge A B --beta 0.5 --only '^llm\\.' --copy-rest B --out mix --dry-run
    """
    from data_pipeline.errors import UserError
    from pretrain.merge.prepare import prepare
    from pretrain.merge.request import request
    from pretrain.merge.tool import execute

    shares = _numbers(weights) if weights is not None else None
    asked = request(inputs, beta=beta, weights=shares, only=only, copy_rest=copy_rest, dtype=dtype)
    (made,), opened = prepare(asked)
    if dry_run:
        typer.echo("\n".join(made.lines()))
        return
    if out is None:
        raise UserError("--out DIR is missing: where to write (or --dry-run to see the plan)")
    with _bar("merging", made.size) as bar:
        execute([made], opened, [out], progress=bar.add)
    typer.echo(f"{out}: {made.lines()[-1]}" if bar.moved else f"{out}: done before, left as it is")


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


def _numbers(text: str) -> list[float]:
    from data_pipeline.errors import UserError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--weights {text}: write numbers with commas between them, such as 1,2,1") from None


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
