"""The ranks of one training stage: watched together, stopped together, and judged by their exit codes."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, Protocol

from launch.supervise.rank_process import Rank, RankProcess
from pretrain.run.exit_codes import DONE, FAILED, GO_ON, USER_ERROR

LOST = 1000  # in place of an exit code, where the machine or actor that would know it is gone
LAST_WORDS_SECONDS = 3.0
HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Outcome:
    """How a group ended. code: 0, 2, 75 or 1; failed: rank that failed first; codes: exit code by rank."""

    code: int
    failed: int | None = None
    codes: Mapping[int, int] = field(default_factory=dict)


class StopSignals:
    """Counts SIGINT, SIGTERM and SIGHUP while the block runs, in place of what they would do."""

    def __init__(self) -> None:
        self.count = 0
        self.first: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.first = self.first or signal.Signals(number).name

    def __enter__(self) -> StopSignals:
        for number in HEARD:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP, and that is to stay
                self._previous[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Group(Protocol):
    """Running ranks, wherever they run."""

    size: int
    poll_seconds: float

    def codes(self) -> dict[int, int]:
        """Exit codes of the ranks that have ended; -N where signal N killed the rank."""

    def send(self, number: int) -> None:
        """Pass a signal to every rank that still runs."""

    def kill(self) -> None:
        """End every rank that still runs."""

    def tail(self, rank: int) -> str:
        """The last lines that a rank wrote since this group started it."""


class LocalGroup:
    """Ranks that are children of this process."""

    poll_seconds = 0.05

    def __init__(self, ranks: Sequence[Rank]) -> None:
        self.size = len(ranks)
        self.processes: list[RankProcess] = []
        try:
            for rank in ranks:
                self.processes.append(RankProcess(rank))
        except BaseException:
            self.kill()
            raise

    def codes(self) -> dict[int, int]:
        polled = {number: process.poll() for number, process in enumerate(self.processes)}
        return {number: code for number, code in polled.items() if code is not None}

    def send(self, number: int) -> None:
        for process in self.processes:
            process.send(number)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def tail(self, rank: int) -> str:
        return self.processes[rank].tail()


def supervise(group: Group, stop: StopSignals, tick: Callable[[bool], None]) -> Outcome:
    """Wait until all ranks have ended; `tick(stopping)` is called at every look at them.

    The first stop signal is passed on as SIGTERM, and the ranks get the time a save takes; the second kills.
    A rank that fails takes the others with it, after a moment for their own last words.
    """
    asked, ended = False, False
    failed: int | None = None
    deadline: float | None = None
    try:
        while not ended:
            codes = group.codes()
            tick(asked)
            if stop.count and not asked:
                asked = True
                group.send(signal.SIGTERM)
            failed = failed if failed is not None else first_failure(codes, asked)
            # A rank that had not begun when it was stopped would be waited for by its peers.
            unbegun = asked and -signal.SIGTERM in codes.values()
            if deadline is None and (failed is not None or unbegun):
                deadline = time.monotonic() + LAST_WORDS_SECONDS
            ended = len(codes) == group.size
            if ended or stop.count > 1 or (deadline is not None and time.monotonic() > deadline):
                break
            time.sleep(group.poll_seconds)
    finally:
        group.kill()
    return judge(group.codes(), failed, asked, killed=not ended and stop.count > 1)


def first_failure(codes: Mapping[int, int], stopping: bool) -> int | None:
    """The rank to blame: of those seen at once, one that was killed or lost, as its peers only lost it."""
    fine = {DONE, GO_ON} | ({-signal.SIGTERM, -signal.SIGINT} if stopping else set())
    bad = sorted(rank for rank, code in codes.items() if code not in fine)
    return min(bad, key=lambda rank: (0 < codes[rank] < LOST, rank), default=None)


def judge(codes: Mapping[int, int], failed: int | None, stopping: bool, killed: bool) -> Outcome:
    """The stage's exit code from those of its ranks."""
    if failed is not None:
        return Outcome(USER_ERROR if codes[failed] == USER_ERROR else FAILED, failed, codes)
    if killed:
        return Outcome(FAILED, None, codes)
    if stopping and any(code != DONE for code in codes.values()):
        return Outcome(GO_ON, None, codes)
    return Outcome(GO_ON if GO_ON in codes.values() else DONE, None, codes)


def describe_exit(code: int) -> str:
    """`exit code 1`, or the signal's name with its usual cause."""
    if code == LOST:
        return "the loss of its node or Ray actor"
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name} (often: out of memory)" if name == "SIGKILL" else name
