"""Rebuilds rows at which two workers died, one by one, in throw-away processes, to find the bad sample.

Two crashes (SIGSEGV and the like) while decoding the same sample prove that the sample is bad: it is replaced like any
unusable sample. A kill (SIGKILL: usually the kernel is out of memory), an exit or a stall proves nothing about the
data: the row is tried again, and an error follows if it keeps failing.
"""

from __future__ import annotations

import selectors
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from data_pipeline.activity import Activity, Sample
from data_pipeline.batches.spec import Batch
from data_pipeline.batches.work_items import BuilderSetup, WorkItem, join_batches
from data_pipeline.workers.failures import (
    MAX_ROW_DEATHS,
    MAX_ROW_STALLS,
    MAX_SAMPLE_CRASHES,
    POLL_SECONDS,
    death_error,
    describe_sample,
    stall_error,
    startup_activity,
)
from data_pipeline.workers.watchdog import Stall, StallLimits, StallWatch
from data_pipeline.workers.worker import READY, WorkMessage
from data_pipeline.workers.worker_handle import SetupFile, WorkerProcess, describe_exit

CRASH_EXITS = {
    -number for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT)
}
CRASHED = "decoder crash"  # the reason under which a sample that crashes the decoder is counted


class PoolClosed(Exception):
    """The pool was closed while rows were rebuilt."""


@dataclass
class Isolation:
    """Builds an item row by row. `known_bad` collects the samples that crash the decoder: sample -> reason."""

    setups: list[BuilderSetup]
    file: SetupFile
    limits: StallLimits
    is_closing: Callable[[], bool] = lambda: False
    known_bad: dict[Sample, str] = field(default_factory=dict)

    def make(self, item: WorkItem) -> Batch:
        """Build the batch of an item. Raises WorkerError or ReadError if its processes keep failing, and any error
        that building a row raises.
        """
        self._crashes: Counter[Sample] = Counter()
        self._process: WorkerProcess | None = None
        self._startup: Activity | None = None
        try:
            return join_batches(
                [
                    self._make_row(replace(item, start=row, stop=row + 1))
                    for row in range(item.start, item.stop)
                ]
            )
        finally:
            if self._process is not None:
                self._process.kill()

    def _make_row(self, item: WorkItem) -> Batch:
        deaths: list[str] = []
        stalls: list[Stall] = []
        while True:
            if self.is_closing():
                raise PoolClosed
            if self._process is None:
                self._process, self._startup = WorkerProcess(self.file), startup_activity()
            process = self._process
            process.send(WorkMessage(0, item, known_bad={item.stream: self.known_bad}))
            outcome = self._await_result(process)
            if isinstance(outcome, Batch):
                return outcome
            if isinstance(outcome, Exception):
                raise outcome
            self._process = None
            last, exit_code = process.inspect(), process.kill()
            if isinstance(outcome, Stall):
                stalls.append(outcome)
            elif (
                exit_code in CRASH_EXITS
                and last.url is None
                and last.sample
                and last.sample not in self.known_bad
            ):
                self._crashes[last.sample] += 1
                if self._crashes[last.sample] >= MAX_SAMPLE_CRASHES:
                    self.known_bad[last.sample] = CRASHED
            else:
                deaths.append(describe_exit(exit_code))
            if len(stalls) >= MAX_ROW_STALLS:
                raise stall_error(item, stalls[-1])
            if len(deaths) >= MAX_ROW_DEATHS:
                raise death_error(item, deaths)

    def _await_result(self, process: WorkerProcess) -> Batch | Exception | Stall | None:
        """The process's batch or error, the stall it is in, or None if it is dead."""
        watch = StallWatch(
            self.limits, f"worker {process.pid}", lambda sample: describe_sample(self.setups, sample)
        )
        with selectors.PollSelector() as selector:
            selector.register(process, selectors.EVENT_READ)
            while True:
                while not selector.select(min(POLL_SECONDS, self.limits.warn)):
                    if self.is_closing():
                        raise PoolClosed
                    stall = watch.check(self._startup or process.inspect())
                    if stall is not None:
                        return stall
                try:
                    number, result = process.receive()
                except (EOFError, ConnectionError):
                    return None
                if number != READY:
                    return result
                self._startup = None
