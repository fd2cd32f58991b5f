"""The `dromos` command: run, train, eval, export, report, status, list, and the groups of the other commands."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from launch.cli import data
from launch.cli import recipe as recipe_commands
from launch.cli.base import as_json, group
from launch.cli.merging import diff, merge, soup, sweep, verify

app = group(
    """Pretrain vision-language models from webdataset tars, and interpolate the checkpoints.

    A recipe (YAML) describes the training; flags choose where it runs; KEY=VALUE overrides a key of the recipe.

    \b
    Try:  dromos recipe check configs/demo/flip.yaml
          dromos data prepare configs/demo/flip.yaml
          dromos run configs/demo/flip.yaml --ranks-per-node 2

    Exit codes: 0 done, 2 your input is wrong, 75 stopped and can resume, 1 anything else.
    """
)
RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Overrides: train.steps=500 for every selected training stage, tuned.train.steps=500 for one.",
        show_default=False,
    ),
]
Weights = Annotated[
    str,
    typer.Argument(
        metavar="RUN/STAGE", help="A stage of a run; RUN/STAGE@STEP, @latest or @best chooses a checkpoint."
    ),
]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, for example runs/demo/flip.")]


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    on: Annotated[str, typer.Option("--on", metavar="local|slurm|ray", help="Where to run.")] = "local",
    stage: Annotated[
        list[str] | None,
        typer.Option("--stage", metavar="S,...", help="Only these stages; default: all, in order."),
    ] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", metavar="N", help="Nodes; default 1.")] = None,
    ranks_per_node: Annotated[
        int | None,
        typer.Option("--ranks-per-node", metavar="R", help="Ranks per node; default: one per GPU, else 1."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", metavar="FILE", help="Cluster file (examples: configs/cluster/*.yaml)."),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="On slurm or ray: wait until the job has ended.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be run or submitted; write nothing.")
    ] = False,
) -> None:
    """Run a recipe's stages; unfinished ones resume.

    Skips a stage that is complete. A killed stage resumes from its newest checkpoint. Ctrl-C saves and
    prints the command that resumes.

    \b
    Examples:
      dromos run configs/demo/flip.yaml --ranks-per-node 2
      dromos run configs/demo/sphinx.yaml --stage lm,real train.steps=200
      dromos run configs/demo/flip.yaml --on slurm --nodes 2 --ranks-per-node 8 --dry-run

    Exit codes: 0 done, 2 your input is wrong, 75 stopped and can resume, 1 anything else.
    """
    from launch.run import run as run_job

    stages = split_stages(stage)
    code = run_job(recipe, on, stages, nodes, ranks_per_node, cluster, dry_run, overrides or [], wait)
    raise typer.Exit(code)


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    stage: Annotated[
        str | None,
        typer.Option("--stage", metavar="S", help="The training stage; required if the recipe has several."),
    ] = None,
) -> None:
    """Train one stage as one rank.

    torchrun, srun and Ray start this command. It reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT;
    without them it is the only rank.

    \b
    Examples:
      dromos train configs/demo/flip.yaml --stage masked
      torchrun --nproc-per-node 2 -m launch.cli train configs/demo/flip.yaml --stage masked

    Exit codes: 0 done, 2 your input is wrong, 75 stopped and can resume, 1 anything else.
    """
    from pretrain.recipe.load import only_training_stage
    from pretrain.train.main import exit_now
    from pretrain.train.main import main as train_stage

    code = train_stage(recipe, stage or only_training_stage(recipe), overrides or [])
    if "RANK" in os.environ:
        exit_now(code)
    raise typer.Exit(code)


app.add_typer(recipe_commands.app, name="recipe")
app.add_typer(data.app, name="data")
for module in (merge, sweep, soup, verify, diff):
    module.register(app)


@app.command(name="eval")
def evaluate(
    weights: Weights,
    shuffle: Annotated[
        bool,
        typer.Option("--shuffle", help="Also evaluate captions with images shuffled between samples."),
    ] = False,
) -> None:
    """Evaluate weights on held-out data.

    Prints the metrics of the recipe's `eval` section as JSON.

    \b
    Examples:
      dromos eval runs/demo/flip/tuned
      dromos eval runs/demo/sphinx/real@80 --shuffle
    """
    from pretrain.evaluate.suite import evaluate_weights

    typer.echo(as_json(evaluate_weights(weights, shuffle)))


@app.command()
def export(
    weights: Weights,
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="The folder to write; it must not exist.")],
    format: Annotated[
        str,
        typer.Option(
            "--format", metavar="open_clip|transformers", help="open_clip for FLIP, transformers for an LLM."
        ),
    ],
) -> None:
    """Export weights to open_clip or transformers.

    The folder loads there without Dromos.

    \b
    Examples:
      dromos export runs/demo/flip/tuned --format open_clip --out exported/flip
      dromos export runs/demo/sphinx/mix --format transformers --out exported/llm
    """
    from pretrain.export.write_folder import export as write

    typer.echo(f"written: {write(weights, format, out)}")


@app.command()
def report(run: RunFolder) -> None:
    """Write a report of a run as one HTML page.

    RUN/report.html is self-contained: it includes all images and plots.

    \b
    Example:
      dromos report runs/demo/flip
    """
    from launch.status import run_status

    run_status(run)  # raises UserError if this is not a run folder, before the slow imports
    from pathlib import Path

    from pretrain.report import write

    typer.echo(f"written: {write(Path(run))}")


@app.command()
def status(run: RunFolder) -> None:
    """Show the state of each stage of a run.

    A stage is done, running, not finished (it was stopped; `dromos run` resumes it) or not started. Below it: how many
    of its steps were skipped because a loss or the gradient was not finite, and how many of its evaluations failed,
    with the last one of each. The last line names the process or job that writes into the folder.

    \b
    Example:
      dromos status runs/demo/flip
    """
    from launch.status import status_lines

    for line in status_lines(run):
        typer.echo(line)


@app.command(name="list")
def list_runs(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Folder to search; default: runs.")
    ] = "runs",
) -> None:
    """List the runs below a folder.

    \b
    Example:
      dromos list runs/demo
    """
    from launch.status import find_runs, summary

    runs = find_runs(folder)
    for run_folder in runs:
        typer.echo(summary(run_folder))
    if not runs:
        typer.echo(f"no runs below {folder}", err=True)


def split_stages(stage: list[str] | None) -> list[str] | None:
    """`--stage a,b --stage c` -> [a, b, c]."""
    return [name.strip() for item in stage for name in item.split(",")] if stage else None


def print_version(requested: bool) -> None:
    """Print the version and exit, if requested."""
    if requested:
        from importlib.metadata import version as installed

        typer.echo(f"dromos {installed('dromos')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `dromos` command."""
    from pretrain.run.failures import drop_unwritable_output

    try:
        app(prog_name="dromos")
    finally:
        drop_unwritable_output()
