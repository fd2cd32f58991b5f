"""The ranks of one training stage on this machine: started together, watched, stopped together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from launch.guard import guarded

DONE, USER_ERROR, GO_ON, FAILED = 0, 2, 75, 1
POLL_SECONDS = 0.05
LAST_WORDS_SECONDS = 3.0
HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Rank:
    """What one rank executes; its output is appended to `log`."""

    command: Sequence[str]
    env: Mapping[str, str]
    log: Path


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


class Group:
    """Running ranks. Each has a session of its own, so that a terminal's Ctrl-C reaches the launcher alone,
    and dies with the launcher, whatever becomes of that."""

    def __init__(self, ranks: Sequence[Rank]) -> None:
        self.ranks = ranks
        self.offsets: list[int] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in ranks:
                self._start(rank)
        except BaseException:
            self.kill()
            raise

    def _start(self, rank: Rank) -> None:
        rank.log.parent.mkdir(parents=True, exist_ok=True)
        with open(rank.log, "ab") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} start\n".encode())
            log.flush()
            self.offsets.append(log.tell())
            process = subprocess.Popen(
                guarded(list(rank.command)),
                env=dict(rank.env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)

    def codes(self) -> dict[int, int]:
        """Exit codes of the ranks that have ended; -N where signal N killed the rank."""
        polled = {number: process.poll() for number, process in enumerate(self.processes)}
        return {number: code for number, code in polled.items() if code is not None}

    def send(self, number: signal.Signals) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        """End every rank that still runs, and what it left in its session."""
        for process in self.processes:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def tail(self, rank: int, lines: int = 30) -> str:
        """The last lines that a rank wrote since this group started it."""
        with open(self.ranks[rank].log, "rb") as log:
            log.seek(self.offsets[rank])
            text = log.read()[-65536:].decode(errors="replace")
        return "\n".join(text.rstrip().splitlines()[-lines:])


def supervise(group: Group, stop: StopSignals, tick: Callable[[bool], None]) -> Outcome:
    """Wait until all ranks have ended. `tick(stopping)` is called about twenty times a second.

    The first stop signal is passed on as SIGTERM, and the ranks get the time a save takes; the second kills.
    A rank that fails takes the others with it, after a moment for their own last words.
    """
    asked, deadline = False, None
    failed: int | None = None
    try:
        while True:
            codes = group.codes()
            tick(asked)
            if stop.count and not asked:
                asked = True
                group.send(signal.SIGTERM)
            if failed is None and (failed := first_failure(codes, asked)) is not None:
                deadline = time.monotonic() + LAST_WORDS_SECONDS
            if deadline is None and asked and any(code == -signal.SIGTERM for code in codes.values()):
                deadline = (
                    time.monotonic() + LAST_WORDS_SECONDS
                )  # it had not begun; its peers would wait for it
            if len(codes) == len(group.processes):
                break
            if stop.count > 1 or (deadline is not None and time.monotonic() > deadline):
                break
            time.sleep(POLL_SECONDS)
    finally:
        finished = len(group.codes()) == len(group.processes)
        group.kill()
    return judge(group.codes(), failed, asked, killed=not finished and stop.count > 1)


def first_failure(codes: Mapping[int, int], stopping: bool) -> int | None:
    """The rank to blame: of those seen at once, one that a signal killed, as its peers only lost it."""
    fine = {DONE, GO_ON} | ({-signal.SIGTERM, -signal.SIGINT} if stopping else set())
    bad = sorted(rank for rank, code in codes.items() if code not in fine)
    return min(bad, key=lambda rank: (codes[rank] > 0, rank), default=None)


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
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name} (often: out of memory)" if name == "SIGKILL" else name


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
