"""Progress of a stage, read from its metrics.jsonl: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

PLAIN_SECONDS = 10.0
TAIL_BYTES = 1 << 16


class Tail:
    """New rows of a JSON-lines file that another process appends to, cuts on resume, or has not made yet.

    Of what is there at the start, only the end is read: a long run's file is large, and its last rows say enough.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset: int | None = None

    def read(self) -> list[dict[str, Any]]:
        try:
            with open(self.path, "rb") as file:
                size = file.seek(0, 2)
                if self.offset is None or size < self.offset:
                    self.offset = max(0, size - TAIL_BYTES)
                file.seek(self.offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]  # a line without its end is still being written
        self.offset += len(whole)
        return [row for line in whole.splitlines() if (row := _parse(line)) is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


class Figures:
    """What is shown of a run: last step, loss, rates smoothed over the last steps, time left."""

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
        times = row.get("time") or {}
        seconds = times.get("step")
        self.rate = _smooth(self.rate, times.get("samples_per_second"))
        self.step_seconds = _smooth(self.step_seconds, seconds)
        if seconds and times.get("data_wait") is not None:
            self.wait_share = _smooth(self.wait_share, min(1.0, times["data_wait"] / seconds))

    @property
    def left(self) -> float | None:
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
        if self.left is not None:
            parts.append(f"ETA {clock(self.left)}")
        return "  ".join(parts)


def _smooth(old: float | None, new: float | None) -> float | None:
    if not isinstance(new, int | float):
        return old
    return new if old is None else 0.9 * old + 0.1 * new


def clock(seconds: float) -> str:
    """3725 -> 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class View(Protocol):
    """Shows figures; `update` may be called as often as one likes."""

    def update(self, stopping: bool = False) -> None: ...


class _View:
    def __init__(self, stage: str, folder: Path, total: int | None) -> None:
        self.stage = stage
        self.tail = Tail(folder / "metrics.jsonl")
        self.figures = Figures(total)

    def _read(self) -> bool:
        rows = self.tail.read()
        for row in rows:
            self.figures.add(row)
        return bool(rows)


class PlainView(_View):
    """One line at most every ten seconds, and one at the end; for logs and pipes."""

    def __init__(
        self,
        stage: str,
        folder: Path,
        total: int | None,
        say: Callable[[str], None],
        every: float = PLAIN_SECONDS,
    ) -> None:
        super().__init__(stage, folder, total)
        self.say, self.every = say, every
        self.last = time.monotonic()
        self.unsaid = False

    def __enter__(self) -> PlainView:
        self._read()  # what an earlier start left is where this one begins, not news
        return self

    def update(self, stopping: bool = False) -> None:
        self.unsaid = self._read() or self.unsaid
        if self.unsaid and time.monotonic() - self.last >= self.every:
            self._line()

    def _line(self) -> None:
        of = f"/{self.figures.total}" if self.figures.total else ""
        self.say(f"{self.stage}  step {self.figures.step}{of}  {self.figures.text()}")
        self.last, self.unsaid = time.monotonic(), False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._read() or self.unsaid:
            self._line()


class LiveView(_View):
    """A bar in the terminal, redrawn by `update` alone: a refresh thread and forking do not go together."""

    def __init__(self, stage: str, folder: Path, total: int | None, console: Console) -> None:
        super().__init__(stage, folder, total)
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=max(6, min(28, console.width - 72))),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            auto_refresh=False,
        )
        self.task = self.progress.add_task(stage, total=total, figures="starting")
        self.drawn = 0.0

    def __enter__(self) -> LiveView:
        self.progress.start()
        return self

    def update(self, stopping: bool = False) -> None:
        now = time.monotonic()
        if now - self.drawn < 0.1:
            return
        self._read()
        self.drawn = now
        figures = self.figures.text() or "starting"
        text = "saving, Ctrl-C again kills" if stopping else figures
        self.progress.update(self.task, completed=self.figures.step, figures=text)
        self.progress.refresh()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._read()
        self.progress.update(self.task, completed=self.figures.step, figures=self.figures.text())
        self.progress.refresh()
        self.progress.stop()


def view(stage: str, folder: Path, total: int | None, console: Console) -> LiveView | PlainView:
    """The view that suits the console."""
    if console.is_terminal:
        return LiveView(stage, folder, total, console)
    return PlainView(stage, folder, total, lambda text: console.print(text, highlight=False, soft_wrap=True))
