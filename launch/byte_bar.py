"""A progress bar of bytes or elements, with its rate: on a terminal only, on standard error, gone at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer


class Bar:
    """Counts what is done and shows it. `moved`: what was done, shown or not. `say`: a line, above the bar."""

    def __init__(self, advance: Callable[[int], None], say: Callable[[str], None]) -> None:
        self.moved = 0
        self.say = say
        self._advance = advance

    def add(self, count: int) -> None:
        self.moved += count
        self._advance(count)


@contextmanager
def counting(what: str, total: int, unit: str = "bytes") -> Iterator[Bar]:
    """`what` is said before the bar; `total` in `unit`, which is bytes or elements."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        ProgressColumn,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    figures: tuple[ProgressColumn, ...] = (DownloadColumn(), TransferSpeedColumn())
    if unit != "bytes":
        figures = (TaskProgressColumn(),)
    console = Console(stderr=True)
    with Progress(
        TextColumn(what),
        BarColumn(),
        *figures,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(what, total=total)

        def say(text: str) -> None:
            if console.is_terminal:
                progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                typer.echo(text, err=True)

        yield Bar(lambda count: progress.advance(task, count), say)
