"""Stop signals of a launcher: counted while it supervises ranks, raised as KeyboardInterrupt while it merges.

`supervise` (launch/supervise/rank_group.py) forwards the first signal to the ranks as SIGTERM; the second kills them.
What a rank does on SIGTERM is in pretrain/train/stop_signals.py.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Counts SIGINT, SIGTERM and SIGHUP while the block runs; suspends their usual effect."""

    def __init__(self) -> None:
        self.count = 0
        self.first: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.first = self.first or signal.Signals(number).name

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP; keep it ignored
                self._previous[number] = signal.signal(number, self._count)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@contextmanager
def signals_interrupt(*extra: signal.Signals) -> Iterator[None]:
    """SIGTERM, SIGHUP and `extra` raise KeyboardInterrupt in the block, as Ctrl-C does.

    A signal that is ignored (as under nohup) or has a handler is left alone. Has no effect outside the main thread.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    redirected = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP, *extra)
        if in_main_thread and signal.getsignal(number) is signal.SIG_DFL
    ]
    for number in redirected:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in redirected:
            signal.signal(number, signal.SIG_DFL)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
