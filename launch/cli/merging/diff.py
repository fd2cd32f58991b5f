"""`dromos diff`: how far two models are from each other, as a table, as data, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.base import App

OTHER_PICTURES = (".png", ".jpg", ".jpeg", ".pdf", ".webp", ".gif", ".html")


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="An address, as for dromos merge.")],
    b: Annotated[str, typer.Argument(metavar="B", help="An address, as for dromos merge.")],
    depth: Annotated[
        int,
        typer.Option(
            "--depth",
            metavar="N",
            min=1,
            help="Modules: the first N parts of a name; layers are one.",
        ),
    ] = 3,
    top: Annotated[
        int, typer.Option("--top", metavar="K", min=0, help="List the K tensors farthest apart.")
    ] = 10,
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture", metavar="FILE.svg", help="Layers by modules as a map; open it in a browser."
        ),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="A row a tensor, into a file.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Everything, for a program.")] = False,
) -> None:
    """Compare two models, tensor by tensor.

    Relative L2 distance |B-A|/|A|, cosine, largest difference, the share of elements with the same sign and of equal
    ones, of each tensor and each module; sums in fp64, in constant memory. Tensors that only one has, or that have
    other shapes, are listed. Reads whatever dromos merge reads.

    \b
    Examples:
      dromos diff runs/demo/sphinx/real runs/demo/sphinx/synthetic --picture diff.svg
      dromos diff base tuned --depth 2 --top 20 --csv diff.csv

    Exit codes: 0 compared, whatever was found; 2 your input is wrong; 1 anything else.
    """
    from data_pipeline.errors import UserError
    from data_pipeline.storage.files import publish
    from launch.cli.progress_bar import counting
    from pretrain.merge.diff.compare import as_csv, compared, lines
    from pretrain.weights.dtypes import elements
    from pretrain.weights.source import open_weights

    csv, picture = (path.expanduser() if path is not None else None for path in (csv, picture))
    for path in (csv, picture):
        if path is not None:
            check_writable(path)
    if picture is not None and picture.suffix.lower() in OTHER_PICTURES:
        raise UserError(f"--picture {picture}: the picture is SVG; name it {picture.with_suffix('.svg')}")
    one, two = open_weights(a), open_weights(b)
    held = set(two.names())
    total = sum(elements(one.info(name)[1]) for name in one.names() if name in held)
    with counting("comparing", total, unit="elements") as bar:
        found = compared(one, two, progress=bar.add)
    if csv is not None:
        publish(csv, as_csv(found, depth).encode())
    if picture is not None:
        from pretrain.merge.diff.heatmap import picture as drawn

        publish(picture, drawn(found).encode())
    if json:
        from launch.cli.base import as_json

        typer.echo(as_json(found.plain(depth)))
        return
    typer.echo("\n".join(lines(found, depth, top)))
    for path in (csv, picture):
        if path is not None:
            typer.echo(f"written: {path}")


def check_writable(path: Path) -> None:
    """Raises UserError where a file cannot be written, before hours of comparing."""
    import os

    from data_pipeline.errors import UserError

    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{path}: cannot be written; name a file in a folder that can")


def register(app: App) -> None:
    """Add the command to `dromos`."""
    app.command()(diff)
