"""Progress of bytes or elements, with the rate, on stderr: a bar on a terminal, else one line per minute."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

LINE_SECONDS = 60.0  # between two lines without a terminal
NARROW_COLUMNS = 64  # below this width, bar and numbers do not fit in one line


class Bar:
    """Counts and shows progress. moved: the count so far; say: prints a line above the bar."""

    def __init__(self, advance: Callable[[int], None], say: Callable[[str], None]) -> None:
        self.moved = 0
        self.say = say
        self._advance = advance

    def add(self, count: int) -> None:
        self.moved += count
        self._advance(count)


@contextmanager
def counting(label: str, total: int, unit: str = "bytes") -> Iterator[Bar]:
    """Show progress during the block. `total` is in `unit`: bytes or elements."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Bar(_log(label, total, unit), lambda text: typer.echo(text, err=True))
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
    columns: tuple[ProgressColumn, ...] = (TextColumn(label), BarColumn(), *figures, TimeRemainingColumn())
    if console.width < NARROW_COLUMNS:
        columns = (TextColumn(label), TaskProgressColumn(), *figures[1:], TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=total)

        def say(text: str) -> None:
            progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

        yield Bar(lambda count: progress.advance(task, count), say)


def _log(label: str, total: int, unit: str) -> Callable[[int], None]:
    """Prints a line every LINE_SECONDS, so that the log of a long job shows that it still runs."""
    started = last_line = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last_line
        done += count
        now = time.monotonic()
        if now - last_line >= LINE_SECONDS:
            last_line = now
            share = f"{done / total:.0%} of " if total else ""
            rate = done / (now - started)
            figures = (
                f"{total / 1e9:,.1f} GB, {rate / 1e6:,.0f} MB/s"
                if unit == "bytes"
                else f"{total:,} {unit}, {rate:,.0f} a second"
            )
            typer.echo(f"{label}: {share}{figures}", err=True)

    return advance
