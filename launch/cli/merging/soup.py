"""`dromos soup`: the mean of those models whose mean scores best."""

from __future__ import annotations

from typing import Annotated

import typer

from launch.cli.base import App
from launch.cli.merging import flags


def soup(
    inputs: Annotated[
        list[str], typer.Argument(metavar="A B [C]...", help="Addresses, as for dromos merge.")
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out", metavar="DIR", help="The folder or s3:// URL to write; it appears when complete."
        ),
    ],
    score_cmd: Annotated[
        str | None, typer.Option("--score-cmd", metavar="CMD", help=f"Scores a model. {flags.PROTOCOL}")
    ] = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="The mean of all; needs no score.")] = False,
    metric: flags.Metric = None,
    lower_is_better: flags.Lower = None,
    timeout: flags.Timeout = None,
    only: flags.Only = None,
    exclude: flags.Exclude = None,
    copy_rest: flags.CopyRest = None,
    vocabulary: flags.Vocabulary = None,
    dtype: flags.Dtype = None,
) -> None:
    """Find the greedy soup of several models (Wortsman et al. 2022, arXiv 2203.05482).

    Every model is scored; from the best one downwards each is added if the score of the mean does not drop. Score on
    held-out data that is not the test set. Every mean is computed from the inputs and rounded once. DIR has the soup,
    soup.json with every trial, and the command's logs; until then they are in DIR.trials, and run again it goes on
    there. One candidate is on the disk at a time, below TMPDIR if DIR is in a store.

    \b
    Examples:
      dromos soup runs/r/a runs/r/b runs/r/c --score-cmd 'python eval.py {}' --out soup
      dromos soup A B C --score-cmd 'python eval.py {}' --metric loss --lower-is-better --out soup
      dromos soup A B C --uniform --out mean

    Exit codes: 0 done; 2 your input is wrong, or the command failed (its log is named); 75 stopped, the same command
    goes on; 1 anything else.
    """
    from os.path import expanduser

    from data_pipeline.errors import UserError
    from launch.cli.base import resumable
    from launch.cli.progress_bar import counting
    from launch.supervise.guard import guarded
    from pretrain.merge.output.overflow import note as overflow_note
    from pretrain.merge.planning.planner import prepare
    from pretrain.merge.planning.request import request
    from pretrain.merge.sweeps.scoring import parse_command
    from pretrain.merge.sweeps.soup import find_soup

    if score_cmd is None and not uniform:
        raise UserError(
            "--score-cmd CMD is missing: how a model is scored (or --uniform for the mean of all)"
        )
    out = expanduser(out)
    command = parse_command(score_cmd, "--score-cmd", timeout, guarded) if score_cmd is not None else None
    flags.check_scored(
        "--score-cmd", command is not None, metric=metric, lower_is_better=lower_is_better, timeout=timeout
    )
    rest = {
        "only": only,
        "exclude": exclude,
        "copy_rest": copy_rest,
        "vocabulary": vocabulary,
        "dtype": dtype,
    }
    asked = request(inputs, method="soup", **rest)
    (plan,), opened = prepare(asked)
    for note in plan.notes:
        typer.echo(f"note: {note}", err=True)
    with resumable(), counting("merging", plan.size * (1 if uniform else 2 * len(inputs))) as bar:
        made = find_soup(
            asked, opened, out, command, uniform=uniform, metric=metric, lower=lower_is_better,
            progress=bar.add, told=bar.say,
        )  # fmt: skip
    if (said := overflow_note({"the soup": made.record})) is not None:
        typer.echo(f"note: {said}", err=True)
    typer.echo("\n".join(made.lines()))
    typer.echo(f"written: {out}" if bar.moved else f"{out}: done before, left as it is")


def register(app: App) -> None:
    """Add the command to `dromos`."""
    app.command()(soup)
