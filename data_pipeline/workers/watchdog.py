"""How long a process may read or decode one thing before that is said, and before it is ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from data_pipeline.activity import Activity, Sample

log = logging.getLogger("dromos.loader")


@dataclass(frozen=True)
class StallLimits:
    """Seconds: after `warn` a read or decode is named in the log, and again after each doubling; `error` ends it."""

    warn: float = 30.0
    error: float = 600.0


class StallWatch:
    """Watches one process, on its machine. `place` puts a sample into words: the url of its shard, and where it stands
    there; `warn` takes what is said.
    """

    def __init__(
        self,
        limits: StallLimits,
        who: str,
        place: Callable[[Sample], str],
        warn: Callable[[str], None] = log.warning,
    ) -> None:
        self._limits, self._who, self._place, self._warn = limits, who, place, warn
        self._warned: tuple[float, float] = (
            0.0,
            0.0,
        )  # since when, and after how many seconds it was said last

    def see(self, doing: Activity) -> str | None:
        """Warn if it is time to; what has taken too long, in words, once it has."""
        since = doing.reading_since or doing.decoding_since
        if not since:
            return None
        seconds = time.monotonic() - since
        what = f"reading {doing.url}"
        if doing.url is None and doing.sample is not None:
            what = f"decoding {self._place(doing.sample)}"
        if self._warned[0] != since:
            self._warned = (since, 0.0)
        if seconds >= max(self._limits.warn, 2 * self._warned[1]):
            self._warned = (since, seconds)
            self._warn(f"{self._who} has been {what} for {seconds:.0f} s")
        return f"{what} for {seconds:.0f} s" if seconds >= self._limits.error else None
