"""Plugin of coverage.py that saves what a process has run twice a second: many processes end by SIGKILL."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import coverage

SECONDS = 0.5


class PeriodicSave(coverage.CoveragePlugin):
    """Started in each process that coverage.py measures, also a forked one."""

    def configure(self, config: Any) -> None:
        threading.Thread(target=save_often, daemon=True).start()


def save_often() -> None:
    """A save adds what was run since the last one."""
    while True:
        time.sleep(SECONDS)
        measurement = coverage.Coverage.current()
        if measurement is not None:
            with contextlib.suppress(Exception):  # such as a folder that is gone: the test has ended
                measurement.save()


def coverage_init(registry: Any, options: Any) -> None:
    """Called by coverage.py."""
    registry.add_configurer(PeriodicSave())
