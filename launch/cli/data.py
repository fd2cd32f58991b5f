"""`dromos data index|show|view|simulate|prepare`: inspects, indexes and filters sources, and makes demo data."""

from __future__ import annotations

import json
import os
import re
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
    """Turn an OSError about a named file into a ReadError: the problem is in the user's file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        name = os.fsdecode(error.filename2 or error.filename)
        raise ReadError(f"cannot open {name}: {error.strerror}; fix it and run again") from error


app = group("Index, show, filter and prepare sources of tars.")

Sources = Annotated[
    list[str], typer.Argument(metavar="SRC", help="Folders or patterns such as data/{00000..00031}.tar.")
]


@app.command()
def index(
    sources: Sources,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, metavar="N", help="Worker processes. Default: one per core."),
    ] = None,
) -> None:
    """Index sources: count and locate every sample.

    Reads the headers of every tar once, and writes shards.parquet and the packed offsets to _index/ beside the tars.
    A later run, also after a kill, reads only new and changed tars. Training needs no index; with one it starts
    faster and checks more.

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
        str | None, typer.Option("--html", metavar="FILE", help="Write an HTML page with images and plots.")
    ] = None,
    images: Annotated[
        str | None,
        typer.Option("--images", metavar="DIR", help="Folder with the images of an instruction file."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show sources: format, samples, problems.

    Reads tars (webdataset, img2dataset, packed text); parquet of LAION, LAION-COCO, COYO, DataComp, RefinedWeb and
    FineWeb; CC3M's .tsv; open_clip's .csv; json and jsonl of LLaVA, ShareGPT and PaliGemma. SRC is a folder, a
    pattern or a file.

    \b
    Examples:
      dromos data show data/demo/digits/train
      dromos data show 's3://corpus/laion400m/{00000..41407}.tar' --json
      dromos data show laion2b-en/ --html laion.html
      dromos data show blip_laion_cc_sbu_558k.json --images llava/images

    Exit codes: 0, or 2 if a source has a problem.
    """
    if samples is not None and samples < 0:
        raise UserError(f"--samples {samples}: write a number from 0")
    if html is not None and len(sources) > 1:
        raise UserError(
            f"--html {html}: a page shows one source, not {len(sources)}; write one page per source"
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
        # JSON escapes the control characters below the blank, but not these, which terminals obey, too.
        text = re.sub("[\x7f-\x9f]", lambda match: f"\\u{ord(match[0]):04x}", text)
        typer.echo(text.encode("utf-8", "replace").decode())
    else:
        _print(described, 5 if samples is None else samples)
    if html is not None and not as_json:
        typer.echo(f"\n{html}: written")
    if any(about["problems"] for about in described):
        raise typer.Exit(USER_ERROR)


def _print(described: list[dict[str, Any]], samples: int) -> None:
    """Print the reports of sources, with at most `samples` samples each."""
    from data_pipeline.show import render

    colours = {"problem": "red", "note": "yellow", "title": "cyan"}
    width = min(shutil.get_terminal_size().columns, 140) if sys.stdout.isatty() else 140
    for about in described:
        for kind, line in render(about | {"first": about["first"][:samples]}, width):
            typer.secho(line, bold=kind == "title", fg=colours.get(kind))


@app.command()
def view(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder or pattern of tars.")],
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Name of the view, for recipes.")],
    where: Annotated[
        str | None,
        typer.Option("--where", metavar="FILTER", help="Expression over columns of each SHARD.parquet."),
    ] = None,
    ids: Annotated[
        str | None,
        typer.Option("--ids", metavar="FILE", help="Ids: one per line, a .npy, or a column of a .parquet."),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(
            "--column", metavar="NAME", help="Column that contains the ids. Default: keys in the tars."
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, metavar="N", help="Worker processes. Default: one per core."),
    ] = None,
) -> None:
    """Choose samples of a source to train on.

    Writes a bitmap of the kept samples below _index/views/; does not rewrite tars. A recipe uses the view with
    `sources: {laion: {path: SRC, view: NAME}}`. A filter compares columns with numbers, quoted texts and other
    columns: = != < <= > >=, in [...], is null, and, or, not, parentheses.

    \b
    Examples:
      dromos data view data/laion --name good --where "similarity > 0.3 and width >= 256"
      dromos data view data/laion --name kept --ids kept.txt
    """
    from data_pipeline.index.build_view import Rule, build_view
    from launch.cli.data_reports import ProgressLine

    with named_files(), ProgressLine(source) as progress:
        result = build_view(
            source, name, Rule(where, ids, column), jobs or len(os.sched_getaffinity(0)), progress
        )
    matched = f"{result.matched:,} rows match" if where else f"{result.matched:,} ids"
    typer.echo(
        f"{source}: view {name} keeps {result.kept:,} of {result.samples:,} samples; {matched}, "
        f"{result.absent:,} of them in no tar; {result.without_row:,} samples have no row; {result.fingerprint}"
    )


@app.command()
def simulate(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe's YAML file.")],
    nodes: Annotated[int, typer.Option("--nodes", min=1, metavar="N", help="Number of nodes.")],
    bandwidth: Annotated[
        float, typer.Option("--bandwidth", min=1e-6, metavar="GBPS", help="Bandwidth of each node in Gbit/s.")
    ],
    stage: Annotated[
        str | None, typer.Option("--stage", metavar="S", help="Stage. Default: the only training stage.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            "--samples-per-second",
            min=1e-6,
            metavar="X",
            help="Target rate of all nodes: is the bandwidth enough?",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict a recipe's load on an object store.

    Predicts traffic, requests, cache size, start-up time and shuffle quality of each stream from the real order; reads
    only the sources' manifests. Treats sources on a disk as if they were in an object store.

    \b
    Example:
      dromos data simulate configs/demo/flip.yaml --stage masked --nodes 8 --bandwidth 10
    """
    from launch.cli.data_reports import loads_of, simulation_figures, simulation_lines

    limit, loads = loads_of(recipe, stage, nodes)
    speed = bandwidth * 1e9 / 8
    if as_json:
        streams = {load.name: simulation_figures(load, speed, rate) for load in loads}
        report = {"bytes_a_second": speed, "cache_limit_bytes": limit, "streams": streams}
        typer.echo(json.dumps(report, indent=2))
        return
    for load in loads:
        for line, odd in simulation_lines(load, speed, rate, limit):
            typer.secho(line, fg="yellow" if odd else None)


@app.command()
def prepare(recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe's YAML file.")]) -> None:
    """Make the data that a recipe needs.

    Only for recipes with a `prepare` key (`prepare: demo`). Leaves complete data as it is. Paths are relative to the
    working directory.

    \b
    Example:
      dromos data prepare configs/demo/flip.yaml
    """
    from pretrain.recipe.load import load_recipe

    loaded = load_recipe(recipe, runnable=False)
    if loaded.prepare is None:
        raise UserError(
            f"{recipe}: no `prepare:` key, so there is no data to make; its sources are the paths in `data`"
        )
    from launch.demo.data import prepare as make

    result = make()
    state = "made" if result["made"] else "is already complete:"
    typer.echo(f"{result['root']}: {state} {result['files']} files, {result['bytes'] / 1e6:.1f} MB")
