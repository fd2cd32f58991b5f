"""`dromos sweep`: merges two checkpoints at many betas, and scores each result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from launch.cli.base import App, print_note
from launch.cli.merging import flags

if TYPE_CHECKING:
    from pretrain.merge.merge_plan import Plan
    from pretrain.merge.planning.inputs import OpenedInputs
    from pretrain.merge.sweeps.scoring import Command


def sweep(
    a: flags.A,
    b: flags.B,
    betas: flags.Betas = "0:1:0.1",
    out: flags.SweepOut = None,
    eval_cmd: flags.EvalCommand = None,
    keep: flags.Keep = True,
    metric: flags.Metric = None,
    lower_is_better: flags.Lower = None,
    timeout: flags.Timeout = None,
    method: flags.SweepMethod = "linear",
    only: flags.Only = None,
    exclude: flags.Exclude = None,
    copy_rest: flags.CopyRest = None,
    vocabulary: flags.Vocabulary = None,
    key: flags.Key = None,
    dtype: flags.Dtype = None,
    dry_run: flags.DryRun = False,
) -> None:
    """Merge two checkpoints at many betas in one pass, and score them.

    theta = beta * A + (1 - beta) * B for each beta. Writes DIR/beta-0.30/ and so on, each as dromos merge would; A
    and B are read once for all betas. With --eval-cmd every output is scored: prints a table, and writes
    DIR/sweep.json, sweep.csv, the curve in sweep.svg, and the command's output in DIR/logs. The same command resumes:
    it completes missing outputs and scores. If DIR is in an object store, each output is merged a second time below
    TMPDIR for the command, one at a time.

    \b
    Examples:
      dromos sweep runs/demo/sphinx/real runs/demo/sphinx/synthetic --out sweep
      dromos sweep A B --out sweep --no-keep --eval-cmd 'dromos eval {}' --lower-is-better
      dromos sweep s3://bucket/a s3://bucket/b --out s3://bucket/sweep
      dromos sweep A B --betas 0,0.4,1 --out sweep --eval-cmd 'python eval.py {}' --metric loss

    Exit codes: 0 done; 2 your input is wrong, or the command failed (its log is named); 75 stopped, the same command
    resumes; 1 anything else.
    """
    from data_pipeline.errors import UserError
    from pretrain.merge.sweeps.results import parse_betas
    from pretrain.merge.sweeps.sweep import plan_sweep

    if method not in ("linear", "slerp"):
        raise UserError(f"--method {method}: a sweep is linear or slerp; the other methods have no beta")
    command = flags.score_command("--eval-cmd", eval_cmd, metric, lower_is_better, timeout)
    values = parse_betas(betas)
    tensors = {
        "only": only,
        "exclude": exclude,
        "copy_rest": copy_rest,
        "vocabulary": vocabulary,
        "key": key,
        "dtype": dtype,
    }
    plans, opened = plan_sweep(a, b, values, method=method, **tensors)
    if dry_run:
        typer.echo(plan_text(plans, values, keep))
    else:
        typer.echo(write_sweep(plans, opened, values, out, command, keep, metric, lower_is_better))


def plan_text(plans: Sequence[Plan], betas: list[float], keep: bool) -> str:
    """The dry run: the plan of the middle beta, the output folders, and the bytes to write."""
    from pretrain.merge.planning.describe import lines
    from pretrain.merge.sweeps.results import folder_names

    middle, size = len(plans) // 2, sum(plan.size for plan in plans)
    folders = ", ".join(folder_names(betas))
    return "\n".join(
        [
            *lines(plans[middle]),
            f"This is the plan for beta {betas[middle]:g}. The {len(betas)} betas are written to: {folders}",
            f"writes {size:,} bytes{'' if keep else ', those of one beta at a time'}",
        ]
    )


def write_sweep(
    plans: Sequence[Plan],
    opened: OpenedInputs,
    betas: list[float],
    out: str | None,
    command: Command | None,
    keep: bool,
    metric: str | None,
    lower: bool | None,
) -> str:
    """Write and score the outputs; returns the report: the table of scores, or the folder of each beta."""
    from os.path import expanduser

    from data_pipeline.errors import UserError
    from data_pipeline.storage.files import is_remote, join
    from launch.cli.base import resumable
    from launch.cli.progress_bar import counting
    from pretrain.merge.output.overflow import overflow_warning
    from pretrain.merge.sweeps.scored_sweep import run_sweep

    if out is None:
        raise UserError("--out DIR is missing: the folder to write (or --dry-run to see the plan)")
    out = expanduser(out)
    for note in plans[0].notes:
        print_note(note)
    passes = 2 if keep and command is not None and is_remote(out) else 1
    with resumable(), counting("sweeping", passes * sum(plan.size for plan in plans)) as bar:
        result = run_sweep(
            plans, opened, betas, out, command, keep=keep, metric=metric, lower=lower,
            progress=bar.add, print_line=bar.say,
        )  # fmt: skip
    print_note(overflow_warning({f"beta {beta:g}": record for beta, record in result.records.items()}))
    if command is not None:
        return "\n".join([*result.lines(), f"written: {out}/sweep.json, sweep.csv, sweep.svg"])
    lines = [
        f"beta {scored.beta:g}: {join(out, scored.folder)}"
        for scored in result.points
        if scored.folder is not None and scored.beta in betas
    ]
    return "\n".join(lines if bar.moved else [*lines, "already complete; nothing was written"])


def register(app: App) -> None:
    """Add the command to `dromos`."""
    app.command()(sweep)
