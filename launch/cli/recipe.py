"""`dromos recipe show|check`: prints a recipe as it resolves, and checks that it can run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli.base import group
from pretrain.run.exit_codes import USER_ERROR

if TYPE_CHECKING:
    from pretrain.recipe.schema import MergeStage, Recipe, TrainStage


app = group("Show or check a recipe; nothing runs.")
RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, as for `dromos run`.", show_default=False),
]


@app.command()
def show(
    recipe: RecipePath,
    overrides: Overrides = None,
    stage: Annotated[
        str | None,
        typer.Option("--stage", metavar="S,...", help="Only these stages; overrides apply to them."),
    ] = None,
) -> None:
    """Print a recipe as it resolves.

    Prints every stage with every key, including defaults and overrides. The output is itself a recipe.

    \b
    Examples:
      dromos recipe show configs/demo/flip.yaml
      dromos recipe show configs/demo/flip.yaml --stage tuned optimizer.lr=1e-4
    """
    from pretrain.recipe.dump import as_plain, dump_plain
    from pretrain.recipe.load import load_recipe, select_stages

    loaded = load_recipe(recipe, overrides or [], stage, runnable=False, strict=True)
    plain = as_plain(loaded)
    selected = select_stages(stage, list(loaded.stages), recipe)
    plain["stages"] = {name: plain["stages"][name] for name in selected}
    typer.echo(dump_plain(plain), nl=False)


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    model: Annotated[
        bool, typer.Option("--model", help="Also build each model, without its weights; print what trains.")
    ] = False,
) -> None:
    """Check a recipe before it costs anything.

    Checks keys, values, the rules between them, and that the sources exist. Prints one line per stage. A missing
    source is a warning: it may be on another machine, or not made yet. So is what lies in the sources and is not read.

    With --model, each model is built without memory for its weights, and what trains is printed, at which rate:
    expressions that match no parameter, streams without a trained parameter and `init` weights that do not fit are
    found here. It needs the tokenizers. What comes from a stage that has not run is not checked, and a warning says so.

    \b
    Examples:
      dromos recipe check configs/demo/flip.yaml
      dromos recipe check configs/demo/flip.yaml --model

    Exit codes: 0 it can run, 2 it is wrong or needs features that this version lacks (each is named).
    """
    from launch.data_check import is_prepared, missing_sources, source_warnings
    from pretrain.recipe.checks import unsupported_problems
    from pretrain.recipe.lengths import length_warnings
    from pretrain.recipe.load import load_recipe
    from pretrain.recipe.schema import TrainStage

    loaded = load_recipe(recipe, overrides or [], runnable=False, strict=True)
    ready, wrong = True, False
    for name, stage in loaded.stages.items():
        unsupported = list(
            dict.fromkeys(f"{'.'.join(item.key)}: {item.text}" for item in unsupported_problems(name, stage))
        )
        typer.echo(f"{name}: {describe(stage)}" + ("" if unsupported else "  ok"))
        for text in unsupported:
            typer.echo(f"  {text}")
            ready = False
        for text in length_warnings(stage) if isinstance(stage, TrainStage) else []:
            typer.echo(f"  warning: {text}")
        if model and isinstance(stage, TrainStage) and not unsupported:
            wrong |= not _check_model(name, stage, loaded)
    missing_data = list(missing_sources(loaded, loaded.stages, remote=False))
    for name, key, _, text in missing_data:
        typer.echo(f"warning: {name}.{key}: {text}", err=True)
    for name, key, text in source_warnings(loaded, loaded.stages):
        typer.echo(f"warning: {name}.{key}: {text}", err=True)
    if any(is_prepared(path, loaded) for _, _, path, _ in missing_data):
        typer.echo(f"make the data with: dromos data prepare {recipe}", err=True)
    if wrong:
        typer.echo(f"{recipe}: a model cannot be trained as the recipe says", err=True)
        raise typer.Exit(USER_ERROR)
    if not ready:
        typer.echo(f"{recipe}: valid, but it needs features that are not available yet", err=True)
        raise typer.Exit(USER_ERROR)


def _check_model(name: str, stage: TrainStage, recipe: Recipe) -> bool:
    """Build the model of a stage and print what trains; False, with the reason printed, if it cannot be trained."""
    from data_pipeline.errors import UserError
    from pretrain.build.model_check import check_model
    from pretrain.recipe.lengths import main_stream
    from pretrain.recipe.load import run_dir
    from pretrain.run.address import StageNotReady
    from pretrain.train.schedule import peak_rate

    peak = peak_rate(stage.optimizer, stage.data[main_stream(stage)].batches.largest)
    unchecked = "the model is"
    try:
        for line in check_model(stage, name, run_dir(recipe), peak):
            typer.echo(f"  {line}")
            unchecked = "the weights of init are"
    except StageNotReady as error:
        typer.echo(f"  warning: {unchecked} not checked: {error}")
    except UserError as error:
        typer.echo(f"  {error}")
        return False
    return True


def describe(stage: TrainStage | MergeStage) -> str:
    """A stage in one line."""
    from pretrain.recipe.lengths import train_length
    from pretrain.recipe.schema import MergeStage

    if isinstance(stage, MergeStage):
        terms = " + ".join(f"{weight:g} x {address}" for address, weight in stage.inputs.items())
        return f"merge ({stage.method}) {terms}"
    streams = "; ".join(
        f"{name}: {stream.batches} rows of {', '.join(stream.sources)}" for name, stream in stage.data.items()
    )
    start = f", from {stage.init or stage.continue_}" if stage.init or stage.continue_ else ""
    return f"{stage.objective.kind} for {train_length(stage)}{start}; {streams}"
