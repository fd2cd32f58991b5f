"""Signals that ask a rank to save and stop: each rank sets its own flag.

The flags of all ranks are combined once per step (`StepTotals`).
"""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopFlag:
    """Set by SIGTERM, SIGUSR1 or SIGINT. The handler only sets the flag, so a collective is never interrupted.

    signal_name: the last signal received, None before the first
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._set)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
