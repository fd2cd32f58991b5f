"""The ranks of one training stage: waits for them, forwards signals, and derives the stage's exit code."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from launch.supervise.rank_process import Rank, RankProcess
from launch.supervise.stop_signals import StopSignals
from pretrain.run.exit_codes import DONE, FAILED, RUN_AGAIN, USER_ERROR

LOST = 1000  # stands in for the exit code of a rank whose node or actor is gone
FAILURE_GRACE_SECONDS = 3.0  # for the other ranks to log their own errors after one has failed


@dataclass(frozen=True)
class Outcome:
    """The end of a group. code: exit code 0, 2, 75 or 1; failed: the rank that failed first; codes: by rank."""

    code: int
    failed: int | None = None
    codes: Mapping[int, int] = field(default_factory=dict)


class Group(Protocol):
    """The running ranks of a stage, on any backend."""

    size: int
    poll_seconds: float

    def codes(self) -> dict[int, int]:
        """Exit codes of the ranks that have ended; -N where signal N killed the rank."""

    def send(self, number: int) -> None:
        """Send a signal to every rank that still runs."""

    def kill(self) -> None:
        """Kill every rank that still runs."""

    def tail(self, rank: int) -> str:
        """The last lines of a rank's log since this group started it."""


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
    """Wait until all ranks have ended; calls `tick(stopping)` at every poll.

    The first stop signal is forwarded as SIGTERM, and the ranks may take any time to save; the second one kills them.
    If a rank fails, the others are killed after FAILURE_GRACE_SECONDS.
    """
    stopping, ended = False, False
    failed: int | None = None
    deadline: float | None = None
    try:
        while not ended:
            codes = group.codes()
            tick(stopping)
            if stop.count and not stopping:
                stopping = True
                group.send(signal.SIGTERM)
            failed = failed if failed is not None else first_failure(codes, stopping)
            # SIGTERM ended a rank before it started to train. Its peers would wait for it forever.
            not_started = stopping and -signal.SIGTERM in codes.values()
            if deadline is None and (failed is not None or not_started):
                deadline = time.monotonic() + FAILURE_GRACE_SECONDS
            ended = len(codes) == group.size
            if ended or stop.count > 1 or (deadline is not None and time.monotonic() > deadline):
                break
            time.sleep(group.poll_seconds)
    finally:
        group.kill()
    return group_outcome(group.codes(), failed, stopping, killed=not ended and stop.count > 1)


def first_failure(codes: Mapping[int, int], stopping: bool) -> int | None:
    """The rank that caused the failure, None if none failed.

    If several failed, a killed or lost rank is preferred: the others fail only because they lose their connection to
    it.
    """
    good = {DONE, RUN_AGAIN} | ({-signal.SIGTERM, -signal.SIGINT} if stopping else set())
    bad = sorted(rank for rank, code in codes.items() if code not in good)
    return min(bad, key=lambda rank: (0 < codes[rank] < LOST, rank), default=None)


def group_outcome(codes: Mapping[int, int], failed: int | None, stopping: bool, killed: bool) -> Outcome:
    """Outcome of a stage from the exit codes of its ranks.

    failed: see `first_failure`; stopping: a stop signal was forwarded; killed: a second one killed the ranks.
    """
    if failed is not None:
        return Outcome(USER_ERROR if codes[failed] == USER_ERROR else FAILED, failed, codes)
    if killed:
        return Outcome(FAILED, None, codes)
    if stopping and any(code != DONE for code in codes.values()):
        return Outcome(RUN_AGAIN, None, codes)
    return Outcome(RUN_AGAIN if RUN_AGAIN in codes.values() else DONE, None, codes)


def describe_exit(code: int) -> str:
    """Text of an exit code: `exit code 1`, or the signal's name and its usual cause."""
    if code == LOST:
        return "the loss of its node or Ray actor"
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name} (often: out of memory)" if name == "SIGKILL" else name
