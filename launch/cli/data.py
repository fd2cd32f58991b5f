"""`dromos data index|show|prepare`: what a source is, and the data that a recipe of the repository needs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from data_pipeline.errors import ReadError, UserError
from launch.cli.base import group, printable
from pretrain.run.exit_codes import USER_ERROR


@contextmanager
def named_files() -> Iterator[None]:
    """A file that cannot be read or written, of those that a command is about, is no fault of the program's."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        name = os.fsdecode(error.filename2 or error.filename)
        raise ReadError(f"{name} cannot be used ({error.strerror}); mend that, then run again") from error


app = group("Index, show, filter and prepare sources of tars.")

Sources = Annotated[
    list[str], typer.Argument(metavar="SRC", help="Folders or patterns such as data/{00000..00031}.tar.")
]


@app.command()
def index(
    sources: Sources,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, metavar="N", help="Processes that walk. Default: one a core."),
    ] = None,
) -> None:
    """Index sources: count and locate every sample.

    Walks over the headers of every tar once and writes shards.parquet and the packed offsets beside them, in
    _index/. Run again, it walks over new and changed tars alone, also after it was killed. Training needs no
    index; with one it starts faster and checks more.

    \b
    Example:
      dromos data index data/demo/digits/train
    """
    from data_pipeline.index.build import build_index
    from launch.cli.data_reports import ProgressLine, index_lines

    for path in sources:
        with named_files(), ProgressLine(path) as progress:
            indexed = build_index(path, jobs or len(os.sched_getaffinity(0)), progress)
        for line, odd in index_lines(path, indexed):
            typer.secho(printable(line), fg="yellow" if odd else None, err=odd)


@app.command()
def show(
    sources: Sources,
    samples: Annotated[
        int | None, typer.Option("--samples", metavar="N", help="Samples to show: 5, with --html 24.")
    ] = None,
    html: Annotated[
        str | None, typer.Option("--html", metavar="FILE", help="Write a page with pictures and figures.")
    ] = None,
    images: Annotated[
        str | None, typer.Option("--images", metavar="DIR", help="Folder of an instruction file's pictures.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show sources: format, samples, what is wrong.

    Tars (webdataset, img2dataset, packed text); parquet of LAION, LAION-COCO, COYO, DataComp, RefinedWeb and
    FineWeb; CC3M's .tsv; json and jsonl of LLaVA, ShareGPT and PaliGemma. A folder, a pattern or a file.

    \b
    Examples:
      dromos data show data/demo/digits/train
      dromos data show 's3://corpus/laion400m/{00000..41407}.tar' --json
      dromos data show laion2b-en/ --html laion.html
      dromos data show blip_laion_cc_sbu_558k.json --images llava/images

    Exit codes: 0, or 2 when something is wrong with a source.
    """
    if samples is not None and samples < 0:
        raise UserError(f"--samples {samples}: a number of samples is 0 or more")
    if html is not None and len(sources) > 1:
        raise UserError(
            f"--html {html}: a page is about one source, not {len(sources)}; show them one by one"
        )
    with named_files():
        if html is not None:
            from data_pipeline.show.html import write_page

            described = [write_page(sources[0], html, 24 if samples is None else samples, images).about]
        else:
            from data_pipeline.show import describe

            described = [
                describe(path, first=5 if samples is None else samples, images=images) for path in sources
            ]
    if as_json:
        text = json.dumps(described, indent=2, ensure_ascii=False)
        typer.echo(text.encode("utf-8", "replace").decode())
    else:
        _print(described, 5 if samples is None else samples)
    if html is not None and not as_json:
        typer.echo(f"\n{html}: written")
    if any(about["problems"] for about in described):
        raise typer.Exit(USER_ERROR)


def _print(described: list[dict[str, Any]], samples: int) -> None:
    from data_pipeline.show import render

    colours = {"wrong": "red", "note": "yellow", "title": "cyan"}
    width = min(shutil.get_terminal_size().columns, 140) if sys.stdout.isatty() else 140
    for about in described:
        for kind, line in render(about | {"first": about["first"][:samples]}, width):
            typer.secho(line, bold=kind == "title", fg=colours.get(kind))


@app.command()
def view(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder or pattern of tars.")],
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="What recipes call the view.")],
    where: Annotated[
        str | None, typer.Option("--where", metavar="FILTER", help="Over columns of each SHARD.parquet.")
    ] = None,
    ids: Annotated[
        str | None,
        typer.Option("--ids", metavar="FILE", help="Ids: one a line, a .npy, or a column of a .parquet."),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(
            "--column", metavar="NAME", help="Column that the ids are of. Default: keys in the tars."
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, metavar="N", help="Processes that walk. Default: one a core."),
    ] = None,
) -> None:
    """Choose samples of a source to train on.

    Writes a bitmap of the samples kept below _index/views/; tars are not rewritten. A recipe uses it with
    `sources: {laion: {path: SRC, view: NAME}}`. A filter compares columns with numbers, texts in quotes and each
    other: = != < <= > >=, in [...], is null, and, or, not, parentheses.

    \b
    Examples:
      dromos data view data/laion --name good --where "similarity > 0.3 and width >= 256"
      dromos data view data/laion --name kept --ids kept.txt
    """
    from data_pipeline.index.build_view import Rule, make_view
    from launch.cli.data_reports import ProgressLine

    with named_files(), ProgressLine(source) as progress:
        made = make_view(
            source, name, Rule(where, ids, column), jobs or len(os.sched_getaffinity(0)), progress
        )
    matched = f"{made.matched:,} rows match" if where else f"{made.matched:,} ids"
    typer.echo(
        f"{source}: view {name} keeps {made.kept:,} of {made.samples:,} samples; {matched}, {made.absent:,} of them "
        f"in no tar; {made.rowless:,} samples have no row; {made.fingerprint}"
    )


@app.command()
def simulate(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe's YAML file.")],
    nodes: Annotated[int, typer.Option("--nodes", min=1, metavar="N", help="Nodes that train.")],
    bandwidth: Annotated[
        float, typer.Option("--bandwidth", min=1e-6, metavar="GBPS", help="Gbit a second of each node.")
    ],
    ranks: Annotated[
        int, typer.Option("--ranks-per-node", min=1, metavar="R", help="Ranks on each node.")
    ] = 1,
    stage: Annotated[
        str | None, typer.Option("--stage", metavar="S", help="Stage. Default: the only training stage.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            "--samples-per-second", min=1e-6, metavar="X", help="Of all nodes; is the bandwidth enough?"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what a recipe asks of an object store.

    Traffic, requests, cache, start and shuffle quality of each stream, from the real order; nothing is read but
    the sources' manifests. Sources on a disk count as if they lay in an object store.

    \b
    Example:
      dromos data simulate configs/demo/flip.yaml --stage masked --nodes 8 --bandwidth 10
    """
    from launch.cli.data_reports import loads_of, simulation_figures, simulation_lines

    limit, loads = loads_of(recipe, stage, nodes, ranks)
    speed = bandwidth * 1e9 / 8
    if as_json:
        streams = {load.name: simulation_figures(load, speed, rate) for load in loads}
        told = {"bytes_a_second": speed, "cache_limit_bytes": limit, "streams": streams}
        typer.echo(json.dumps(told, indent=2))
        return
    for load in loads:
        for line, odd in simulation_lines(load, speed, rate, limit):
            typer.secho(line, fg="yellow" if odd else None)


@app.command()
def prepare(recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe's YAML file.")]) -> None:
    """Make the data that a recipe needs.

    For recipes that say how (`prepare: demo`). What is there already and complete is left alone. Paths are
    relative to the working directory.

    \b
    Example:
      dromos data prepare configs/demo/flip.yaml
    """
    from pretrain.recipe.load import load_recipe

    loaded = load_recipe(recipe, runnable=False)
    if loaded.prepare is None:
        raise UserError(
            f"{recipe}: has no `prepare:`, so its data is not made here; its sources are the paths in `data`"
        )
    from launch.demo.data import prepare as make

    made = make()
    word = "made" if made["made"] else "is there already, complete:"
    typer.echo(f"{made['root']}: {word} {made['files']} files, {made['bytes'] / 1e6:.1f} MB")
