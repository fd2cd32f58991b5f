"""`dromos diff`: measures how two models differ; prints a table or JSON, and writes CSV and a heat map."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from launch.cli.base import App
from launch.cli.merging import flags

if TYPE_CHECKING:
    from pretrain.merge.diff.compare import Diff

OTHER_PICTURES = (".png", ".jpg", ".jpeg", ".pdf", ".webp", ".gif", ".html")


def diff(
    a: flags.A,
    b: flags.B,
    depth: flags.Depth = 3,
    top: flags.Top = 10,
    picture: flags.Picture = None,
    csv: flags.Csv = None,
    key: flags.Key = None,
    json: flags.DiffJson = False,
) -> None:
    """Compare two models, tensor by tensor.

    For each tensor and each module: relative L2 distance |B-A|/|A|, cosine, largest difference, the share of elements
    with the same sign, and the share of equal ones. Sums are in fp64, memory is constant. Lists tensors that only one
    model has, or whose shapes differ. Reads everything that dromos merge reads.

    \b
    Examples:
      dromos diff runs/demo/sphinx/real runs/demo/sphinx/synthetic --picture diff.svg
      dromos diff base tuned --depth 2 --top 20 --csv diff.csv

    Exit codes: 0 compared, whatever the result; 2 your input is wrong; 1 anything else.
    """
    from launch.cli.base import as_json
    from pretrain.merge.diff.compare import lines

    csv, picture = (path.expanduser() if path is not None else None for path in (csv, picture))
    check_outputs(csv, picture)
    result = compare(a, b, key)
    write_files(result, depth, csv, picture)
    if json:
        typer.echo(as_json(result.plain(depth)))
    else:
        written = [f"written: {path}" for path in (csv, picture) if path is not None]
        typer.echo("\n".join([*lines(result, depth, top), *written]))


def check_outputs(csv: Path | None, picture: Path | None) -> None:
    """Raises UserError if a file cannot be written; checked before the comparison, which can take hours."""
    from data_pipeline.errors import UserError

    for path in (csv, picture):
        if path is not None:
            check_writable(path)
    if picture is not None and picture.suffix.lower() in OTHER_PICTURES:
        raise UserError(f"--picture {picture}: the picture is SVG; name it {picture.with_suffix('.svg')}")


def check_writable(path: Path) -> None:
    """Raises UserError if a file cannot be written at `path`."""
    import os

    from data_pipeline.errors import UserError

    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{path}: cannot be written; choose a file name in a folder that you can write to")


def compare(a: str, b: str, key: str | None = None) -> Diff:
    """Compare the models at two addresses, with a progress bar."""
    from launch.cli.progress_bar import counting
    from pretrain.merge.diff.compare import compare_sources
    from pretrain.merge.planning.inputs import open_all
    from pretrain.weights.dtypes import elements

    first, second = open_all([a, b], None, key)
    common = set(first.names()) & set(second.names())
    total = sum(elements(first.info(name)[1]) for name in common)
    with counting("comparing", total, unit="elements") as bar:
        return compare_sources(first, second, progress=bar.add)


def write_files(result: Diff, depth: int, csv: Path | None, picture: Path | None) -> None:
    """Write the CSV table and the heat map, where requested."""
    from data_pipeline.storage.files import publish
    from pretrain.merge.diff.compare import as_csv

    if csv is not None:
        publish(csv, as_csv(result, depth).encode())
    if picture is not None:
        from pretrain.merge.diff.heatmap import picture as heat_map

        publish(picture, heat_map(result).encode())


def register(app: App) -> None:
    """Add the command to `dromos`."""
    app.command()(diff)
