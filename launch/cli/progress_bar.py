"""Progress of bytes or elements, with its rate, on standard error: a bar on a terminal, elsewhere a line a minute."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

PERIOD = 60.0
"""seconds between two lines in a log"""
NARROW = 64
"""columns of a terminal on which a bar and all figures would not stand in one line"""


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
    """`what` is said before the figures; `total` in `unit`, which is bytes or elements."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Bar(_log(what, total, unit), lambda text: typer.echo(text, err=True))
        return
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
    columns: tuple[ProgressColumn, ...] = (TextColumn(what), BarColumn(), *figures, TimeRemainingColumn())
    if console.width < NARROW:
        columns = (TextColumn(what), TaskProgressColumn(), *figures[1:], TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)

        def say(text: str) -> None:
            progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

        yield Bar(lambda count: progress.advance(task, count), say)


def _log(what: str, total: int, unit: str) -> Callable[[int], None]:
    """Says every PERIOD how far it is: the log of a job that runs for hours shows that it goes on."""
    begun = said = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, said
        done += count
        now = time.monotonic()
        if now - said >= PERIOD:
            said = now
            share = f"{done / total:.0%} of " if total else ""
            rate = done / (now - begun)
            figures = (
                f"{total / 1e9:,.1f} GB, {rate / 1e6:,.0f} MB/s"
                if unit == "bytes"
                else f"{total:,} {unit}, {rate:,.0f} a second"
            )
            typer.echo(f"{what}: {share}{figures}", err=True)

    return advance
