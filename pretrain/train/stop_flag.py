"""Signals that ask a rank to save and go: they set a flag, which all ranks read together between two steps."""

from __future__ import annotations

import signal
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopFlag:
    """Set by SIGTERM, SIGUSR1 or SIGINT; never acts inside a collective."""

    def __init__(self) -> None:
        self.asked: str | None = None
        for number in ASKING:
            signal.signal(number, self._set)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
