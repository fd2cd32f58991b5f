"""`dromos verify`: checks the output of a merge against its record and its inputs."""

from __future__ import annotations

from typing import Annotated

import typer

from launch.cli.base import App
from launch.cli.merging import flags


def verify(
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="The folder or s3:// URL that dromos merge wrote.")
    ],
    chunks: flags.Chunks = 32,
    seed: flags.ChunkSeed = 0,
    full: flags.Full = False,
    json: flags.VerifyJson = False,
) -> None:
    """Check the output of a merge.

    Checks sizes and digests of every file and tensor against merge.json, merge.json against its own digest, headers,
    index and shapes, NaN and infinities, and that the inputs have not changed; recomputes random chunks from the
    inputs and compares them byte for byte. Writes nothing. Missing inputs are reported, but are not an error.

    \b
    Examples:
      dromos verify mix
      dromos verify mix --chunks 1000 --seed 7
      dromos verify mix --full --json
      dromos verify s3://bucket/mix

    Exit codes: 0 nothing is wrong; 1 something is wrong; 2 OUT is not the output of a merge.
    """
    from launch.cli.base import as_json
    from launch.cli.progress_bar import counting
    from pretrain.merge.verify.check_output import verify as check
    from pretrain.merge.verify.check_output import weight_bytes
    from pretrain.run.exit_codes import FAILED

    with counting("verifying", weight_bytes(out) * (2 if full else 1)) as bar:
        report = check(out, count=chunks, full=full, seed=seed, progress=bar.add)
    typer.echo(as_json(report.plain()) if json else "\n".join(report.lines()))
    if report.wrong:
        raise typer.Exit(FAILED)


def register(app: App) -> None:
    """Add the command to `dromos`."""
    app.command()(verify)
