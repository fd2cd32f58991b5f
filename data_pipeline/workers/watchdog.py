"""Watchdog for stalled reads and decodes: logs a warning after `warn` seconds, reports a stall after `error` seconds.

It only measures how long an activity lasts (see activity.py). ProcessPool kills the process and RayPool the actor; a
thread is not interrupted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from data_pipeline.activity import Activity, Sample

log = logging.getLogger("dromos.loader")


@dataclass(frozen=True)
class StallLimits:
    """Limits on the duration of one read or decode, in seconds.

    A warning is logged after `warn` seconds and each time the duration doubles. After `error` seconds the pool kills
    the process (ProcessPool._replace_worker).
    """

    warn: float = 30.0
    error: float = 600.0


@dataclass(frozen=True)
class Stall:
    """A read or decode that took longer than `StallLimits.error`. `action`: "reading URL" or "decoding SAMPLE"."""

    action: str
    seconds: float
    is_read: bool

    def __str__(self) -> str:
        return f"{self.action} for {self.seconds:.0f} s"


class StallWatch:
    """Measures the activity of one process, from any process of the same machine.

    process_name: name of the process in the warnings
    describe_sample: returns a sample's shard URL and index as text
    warn: receives each warning
    """

    def __init__(
        self,
        limits: StallLimits,
        process_name: str,
        describe_sample: Callable[[Sample], str],
        warn: Callable[[str], None] = log.warning,
    ) -> None:
        self._limits, self._process_name = limits, process_name
        self._describe_sample, self._warn = describe_sample, warn
        # Start of the activity of the last warning, and its duration at that warning.
        self._last_warning: tuple[float, float] = (0.0, 0.0)

    def check(self, activity: Activity) -> Stall | None:
        """Warn if a warning is due. Returns the stall once the activity has lasted `error` seconds."""
        since = activity.reading_since or activity.decoding_since
        if not since:
            return None
        seconds = time.monotonic() - since
        action = f"reading {activity.url}"
        if activity.url is None and activity.sample is not None:
            action = f"decoding {self._describe_sample(activity.sample)}"
        if self._last_warning[0] != since:
            self._last_warning = (since, 0.0)
        stall = Stall(action, seconds, activity.url is not None or activity.sample is None)
        if seconds >= max(self._limits.warn, 2 * self._last_warning[1]):
            self._last_warning = (since, seconds)
            self._warn(f"{self._process_name} has been {stall}")
        return stall if seconds >= self._limits.error else None
