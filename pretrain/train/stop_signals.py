"""Signals that ask a rank to save and stop: each rank sets its own flag.

`Trainer.run` (pretrain/train/trainer.py) reads the flag between steps; `StepTotals` combines the flags of all ranks. If
one is set, the trainer does one more step, saves and returns without an evaluation; `main` (pretrain/train/main.py)
then returns exit code 75 (0 if that was the last step and no evaluation is due). The launcher's part is in
launch/supervise/stop_signals.py and launch/supervise/rank_group.py.
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
