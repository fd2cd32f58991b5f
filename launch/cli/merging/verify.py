"""`dromos verify`: whether the output of a merge is what was written, and what its inputs give."""

from __future__ import annotations

from typing import Annotated

import typer

from launch.cli.base import App


def verify(
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="The folder or s3:// URL that dromos merge wrote.")
    ],
    chunks: Annotated[
        int,
        typer.Option("--chunks", metavar="N", min=0, help="Compute N random chunks again from the inputs."),
    ] = 32,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Which chunks are drawn.")] = 0,
    full: Annotated[
        bool, typer.Option("--full", help="Compute everything again, and read all of the inputs.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Everything found, for a program.")] = False,
) -> None:
    """Check the output of a merge.

    Sizes and digests of every file and tensor against merge.json, merge.json against its own seal, headers, index and
    shapes, NaN and infinities, whether the inputs are still what they were, and random chunks computed again from them,
    byte for byte. Nothing is written. Inputs that are gone are noted and are no mistake.

    \b
    Examples:
      dromos verify mix
      dromos verify mix --chunks 1000 --seed 7
      dromos verify mix --full --json
      dromos verify s3://bucket/mix

    Exit codes: 0 nothing is wrong; 1 something is wrong; 2 OUT is not the output of a merge.
    """
    from launch.cli.progress_bar import counting
    from pretrain.merge.verify.check_output import verify as check
    from pretrain.merge.verify.check_output import weight_bytes
    from pretrain.run.exit_codes import FAILED

    with counting("verifying", weight_bytes(out) * (2 if full else 1)) as bar:
        report = check(out, count=chunks, full=full, seed=seed, progress=bar.add)
    if json:
        from launch.cli.base import as_json

        typer.echo(as_json(report.plain()))
    else:
        typer.echo("\n".join(report.lines()))
    if report.wrong:
        raise typer.Exit(FAILED)


def register(app: App) -> None:
    """Add the command to `dromos`."""
    app.command()(verify)
