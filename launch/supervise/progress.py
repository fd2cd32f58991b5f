"""Progress of a stage, read from its metrics.jsonl: a bar on a terminal, else a line every ten seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from launch.supervise.output import print_line
from pretrain.run.metrics_log import parse

LINE_SECONDS = 10.0  # between two lines without a terminal
REDRAW_SECONDS = 0.1  # between two updates of the bar
TAIL_BYTES = 1 << 16


class Tail:
    """Reads new rows of a JSON-lines file. Another process creates it, appends to it, and truncates it on resume.

    The first read skips all but the last TAIL_BYTES: the file of a long run is large, and its last rows suffice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset: int | None = None

    def read(self) -> list[dict[str, Any]]:
        """Rows since the last read."""
        try:
            with open(self.path, "rb") as file:
                size = file.seek(0, 2)
                if self.offset is None or size < self.offset:
                    self.offset = max(0, size - TAIL_BYTES)
                file.seek(self.offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]  # ignore a last line without newline: it is still being written
        self.offset += len(whole)
        return [row for line in whole.splitlines() if (row := parse(line)) is not None]


class Metrics:
    """Metrics of a running stage: last step, loss, smoothed rates, and the seconds that remain."""

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.step = 0
        self.loss: float | None = None
        self.rate: float | None = None
        self.step_seconds: float | None = None
        self.wait_share: float | None = None

    def add(self, row: dict[str, Any]) -> None:
        self.step = row["step"]
        self.loss = row.get("loss", self.loss)
        times = row.get("time")
        times = times if isinstance(times, dict) else {}
        seconds = times.get("step")
        self.rate = _smooth(self.rate, times.get("samples_per_second"))
        self.step_seconds = _smooth(self.step_seconds, seconds)
        wait = times.get("data_wait")
        if isinstance(seconds, int | float) and seconds > 0 and isinstance(wait, int | float):
            self.wait_share = _smooth(self.wait_share, min(1.0, wait / seconds))

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds to the end; None while unknown."""
        if self.total is None or self.step_seconds is None:
            return None
        return max(0, self.total - self.step) * self.step_seconds

    def text(self) -> str:
        parts = []
        if isinstance(self.loss, int | float):
            parts.append(f"loss {self.loss:.4f}")
        if self.rate is not None:
            parts.append(f"{self.rate:,.0f} samples/s")
        if self.wait_share is not None:
            parts.append(f"data wait {self.wait_share:.0%}")
        if self.seconds_left is not None:
            parts.append(f"ETA {clock(self.seconds_left)}")
        return "  ".join(parts)


def _smooth(old: float | None, new: float | None) -> float | None:
    if not isinstance(new, int | float) or not math.isfinite(new):
        return old
    return new if old is None else 0.9 * old + 0.1 * new


def clock(seconds: float) -> str:
    """Seconds as a clock: 3725 -> 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class View(Protocol):
    """Shows the metrics of a stage. Limits its own output rate, so `update` may be called at any rate."""

    def update(self, stopping: bool = False) -> None: ...


class _MetricsView:
    """A stage's metrics, read from its metrics file."""

    def __init__(self, stage: str, folder: Path, total: int | None) -> None:
        self.stage = stage
        self.tail = Tail(folder / "metrics.jsonl")
        self.metrics = Metrics(total)

    def _read(self) -> bool:
        rows = self.tail.read()
        for row in rows:
            self.metrics.add(row)
        return bool(rows)


class PlainView(_MetricsView):
    """For logs and pipes: at most one line every `every` seconds, and one at the end."""

    def __init__(
        self,
        stage: str,
        folder: Path,
        total: int | None,
        print_line: Callable[[str], None],
        every: float = LINE_SECONDS,
    ) -> None:
        super().__init__(stage, folder, total)
        self.print_line, self.every = print_line, every
        self.last_line = time.monotonic()
        self.unprinted = False

    def __enter__(self) -> PlainView:
        self._read()  # rows of an earlier start are not printed
        return self

    def update(self, stopping: bool = False) -> None:
        self.unprinted = self._read() or self.unprinted
        if self.unprinted and time.monotonic() - self.last_line >= self.every:
            self._line()

    def _line(self) -> None:
        of = f"/{self.metrics.total}" if self.metrics.total else ""
        self.print_line(f"{self.stage}  step {self.metrics.step}{of}  {self.metrics.text()}")
        self.last_line, self.unprinted = time.monotonic(), False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._read() or self.unprinted:
            self._line()


class LiveView(_MetricsView):
    """For terminals: a bar, redrawn only by `update`. A refresh thread would be unsafe in a process that forks."""

    def __init__(self, stage: str, folder: Path, total: int | None, console: Console) -> None:
        super().__init__(stage, folder, total)
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=max(6, min(28, console.width - 72))),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=console,
            auto_refresh=False,
        )
        self.task = self.progress.add_task(stage, total=total, metrics="starting")
        self.drawn = 0.0

    def __enter__(self) -> LiveView:
        self.progress.start()
        return self

    def update(self, stopping: bool = False) -> None:
        now = time.monotonic()
        if now - self.drawn < REDRAW_SECONDS:
            return
        self._read()
        self.drawn = now
        metrics = self.metrics.text() or "starting"
        text = "saving, Ctrl-C again kills" if stopping else metrics
        self.progress.update(self.task, completed=self.metrics.step, metrics=text)
        self.progress.refresh()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._read()
        self.progress.update(self.task, completed=self.metrics.step, metrics=self.metrics.text())
        self.progress.refresh()
        self.progress.stop()


def view(stage: str, folder: Path, total: int | None, console: Console) -> LiveView | PlainView:
    """A bar if the console is a terminal, else plain lines."""
    if console.is_terminal:
        return LiveView(stage, folder, total, console)
    return PlainView(stage, folder, total, partial(print_line, console))
