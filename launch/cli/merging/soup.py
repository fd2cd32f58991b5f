"""`dromos soup`: finds the models whose mean scores best, and writes that mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from launch.cli.base import App, print_note
from launch.cli.merging import flags

if TYPE_CHECKING:
    from pretrain.merge.sweeps.scoring import Command


def soup(
    inputs: flags.Inputs,
    out: flags.RequiredOut,
    score_cmd: flags.ScoreCommand = None,
    uniform: flags.Uniform = False,
    metric: flags.Metric = None,
    lower_is_better: flags.Lower = None,
    timeout: flags.Timeout = None,
    only: flags.Only = None,
    exclude: flags.Exclude = None,
    copy_rest: flags.CopyRest = None,
    vocabulary: flags.Vocabulary = None,
    key: flags.Key = None,
    dtype: flags.Dtype = None,
) -> None:
    """Find the greedy soup of several models (Wortsman et al. 2022, arXiv 2203.05482).

    Scores every model; then, from the best one downwards, adds each model if the score of the mean does not drop.
    Score on held-out data that is not the test set. Every mean is computed from the inputs and rounded once. DIR gets
    the soup, soup.json with every trial, and the command's logs; until then they are in DIR.trials, from where the
    same command resumes. One candidate at a time is on disk, below TMPDIR if DIR is in an object store.

    \b
    Examples:
      dromos soup runs/r/a runs/r/b runs/r/c --score-cmd 'python eval.py {}' --out soup
      dromos soup A B C --score-cmd 'python eval.py {}' --metric loss --lower-is-better --out soup
      dromos soup A B C --uniform --out mean

    Exit codes: 0 done; 2 your input is wrong, or the command failed (its log is named); 75 stopped, the same command
    resumes; 1 anything else.
    """
    from data_pipeline.errors import UserError

    if score_cmd is None and not uniform:
        raise UserError("--score-cmd CMD is missing: it scores a model (or --uniform for the mean of all)")
    command = flags.score_command("--score-cmd", score_cmd, metric, lower_is_better, timeout)
    tensors = {
        "only": only,
        "exclude": exclude,
        "copy_rest": copy_rest,
        "vocabulary": vocabulary,
        "key": key,
        "dtype": dtype,
    }
    typer.echo(write_soup(inputs, out, command, uniform, metric, lower_is_better, tensors))


def write_soup(
    inputs: list[str],
    out: str,
    command: Command | None,
    uniform: bool,
    metric: str | None,
    lower: bool | None,
    tensors: dict[str, Any],
) -> str:
    """Find the soup and write it to `out`; returns the report. `tensors`: --only and the like, by name."""
    from os.path import expanduser

    from launch.cli.base import resumable
    from launch.cli.progress_bar import counting
    from pretrain.merge.output.overflow import overflow_warning
    from pretrain.merge.planning.planner import prepare
    from pretrain.merge.planning.request import make_request
    from pretrain.merge.sweeps.soup import run_soup

    out = expanduser(out)
    merge_request = make_request(inputs, method="soup", **tensors)
    (plan,), opened = prepare(merge_request)
    for note in plan.notes:
        print_note(note)
    with resumable(), counting("merging", plan.size * (1 if uniform else 2 * len(inputs))) as bar:
        result = run_soup(
            merge_request, opened, out, command, uniform=uniform, metric=metric, lower=lower,
            progress=bar.add, print_line=bar.say,
        )  # fmt: skip
    print_note(overflow_warning({"the soup": result.record}))
    end = f"written: {out}" if bar.moved else f"{out}: already complete; nothing was written"
    return "\n".join([*result.lines(), end])


def register(app: App) -> None:
    """Add the command to `dromos`."""
    app.command()(soup)
