"""`dromos sweep`: two checkpoints merged at many betas, and what each is worth."""

from __future__ import annotations

from typing import Annotated

import typer

from launch.cli.base import App
from launch.cli.merging import flags


def sweep(
    a: Annotated[str, typer.Argument(metavar="A", help="An address, as for dromos merge.")],
    b: Annotated[str, typer.Argument(metavar="B", help="An address, as for dromos merge.")],
    betas: Annotated[
        str,
        typer.Option("--betas", metavar="START:STOP:STEP", help="Both ends included; or a list, 0,0.5,1."),
    ] = "0:1:0.1",
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="DIR", help="The folder or s3:// URL of outputs and results."),
    ] = None,
    eval_cmd: Annotated[
        str | None,
        typer.Option("--eval-cmd", metavar="CMD", help=f"Scores an output. {flags.PROTOCOL}"),
    ] = None,
    keep: Annotated[
        bool,
        typer.Option("--keep/--no-keep", help="Keep the outputs, or have one at a time, until it is scored."),
    ] = True,
    metric: flags.Metric = None,
    lower_is_better: flags.Lower = None,
    timeout: flags.Timeout = None,
    method: Annotated[str, typer.Option("--method", metavar="NAME", help="linear or slerp.")] = "linear",
    only: flags.Only = None,
    exclude: flags.Exclude = None,
    copy_rest: flags.CopyRest = None,
    vocabulary: flags.Vocabulary = None,
    dtype: flags.Dtype = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
) -> None:
    """Merge two checkpoints at many betas in one pass, and score them.

    theta = beta * A + (1 - beta) * B for each. Writes DIR/beta-0.30/ and so on, each as dromos merge would; A and B
    are read once for all. With --eval-cmd every output is scored: a table here, DIR/sweep.json, sweep.csv and the
    curve in sweep.svg, what the command prints in DIR/logs. Run again, it goes on with what is not done or scored.
    Of a DIR in a store each output is made once more below TMPDIR, for the command, one at a time.

    \b
    Examples:
      dromos sweep runs/demo/sphinx/real runs/demo/sphinx/synthetic --out sweep
      dromos sweep A B --out sweep --no-keep --eval-cmd 'dromos eval {}' --lower-is-better
      dromos sweep s3://bucket/a s3://bucket/b --out s3://bucket/sweep
      dromos sweep A B --betas 0,0.4,1 --out sweep --eval-cmd 'python eval.py {}' --metric loss

    Exit codes: 0 done; 2 your input is wrong, or the command failed (its log is named); 75 stopped, the same command
    goes on; 1 anything else.
    """
    from os.path import expanduser

    from data_pipeline.errors import UserError
    from data_pipeline.storage.files import is_remote, join
    from launch.cli.base import resumable
    from launch.cli.progress_bar import counting
    from launch.supervise.guard import guarded
    from pretrain.merge.output.overflow import note as overflow_note
    from pretrain.merge.planning.describe import lines
    from pretrain.merge.sweeps.results import folder_names, parse_betas
    from pretrain.merge.sweeps.scored_sweep import run_sweep
    from pretrain.merge.sweeps.scoring import parse_command
    from pretrain.merge.sweeps.sweep import plan_sweep

    if method not in ("linear", "slerp"):
        raise UserError(f"--method {method}: a sweep is linear or slerp; the others have no beta")
    out = expanduser(out) if out is not None else None
    command = parse_command(eval_cmd, "--eval-cmd", timeout, guarded) if eval_cmd is not None else None
    flags.check_scored(
        "--eval-cmd", command is not None, metric=metric, lower_is_better=lower_is_better, timeout=timeout
    )
    numbers = parse_betas(betas)
    asked = {
        "only": only,
        "exclude": exclude,
        "copy_rest": copy_rest,
        "vocabulary": vocabulary,
        "dtype": dtype,
    }
    plans, opened = plan_sweep(a, b, numbers, method=method, **asked)
    if dry_run:
        middle, size = len(plans) // 2, sum(plan.size for plan in plans)
        typer.echo("\n".join(lines(plans[middle])))
        typer.echo(
            f"so for beta {numbers[middle]:g}, and for {len(numbers)} betas: {', '.join(folder_names(numbers))}"
        )
        typer.echo(f"writes {size:,} bytes{'' if keep else ', those of one beta at a time'}")
        return
    if out is None:
        raise UserError("--out DIR is missing: where to write (or --dry-run to see the plan)")
    for note in plans[0].notes:
        typer.echo(f"note: {note}", err=True)
    again = 2 if keep and command is not None and is_remote(out) else 1
    with resumable(), counting("sweeping", again * sum(plan.size for plan in plans)) as bar:
        made = run_sweep(
            plans, opened, numbers, out, command, keep=keep, metric=metric, lower=lower_is_better,
            progress=bar.add, told=bar.say,
        )  # fmt: skip
    if (
        said := overflow_note({f"beta {beta:g}": record for beta, record in made.records.items()})
    ) is not None:
        typer.echo(f"note: {said}", err=True)
    if command is not None:
        typer.echo("\n".join(made.lines()))
        typer.echo(f"written: {out}/sweep.json, sweep.csv, sweep.svg")
        return
    for one in made.betas:
        if one.folder is not None and one.beta in numbers:
            typer.echo(f"beta {one.beta:g}: {join(out, one.folder)}")
    if not bar.moved:
        typer.echo("done before, left as they are")


def register(app: App) -> None:
    """Add the command to `dromos`."""
    app.command()(sweep)
