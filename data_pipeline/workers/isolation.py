"""Rows that ended the workers that made them, made one by one in processes that may die.

What is learnt is whether a sample's content is at fault: a process that dies of a crash (SIGSEGV and the like) twice
while it decodes the same sample is a verdict on that sample, and it is replaced as any unusable one. A process that is
killed (SIGKILL: the kernel wants memory), or that leaves, says nothing about the data: its rows are tried again, and
then that is an error.
"""

from __future__ import annotations

import selectors
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from data_pipeline.activity import Activity, Sample
from data_pipeline.batches.spec import Batch
from data_pipeline.batches.work_items import BuilderSetup, WorkItem, join
from data_pipeline.errors import ReadError, WorkerError
from data_pipeline.workers.watchdog import StallLimits, StallWatch
from data_pipeline.workers.worker import READY, WorkMessage
from data_pipeline.workers.worker_handle import SetupFile, WorkerProcess, ending

CRASHES = {
    -number for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT)
}
CRASHED = "decoder crash"
# Crashes at one sample that condemn it; other deaths at one row that are an error.
VERDICT = 2
ISOLATION_TRIES = 3
# Seconds between two looks at a process that is waited for.
LOOK = 1.0


class Closed(Exception):
    """The pool was closed meanwhile."""


@dataclass
class Isolation:
    """Makes an item row by row. `condemned`, sample -> reason, is what was found out."""

    setups: list[BuilderSetup]
    file: SetupFile
    limits: StallLimits
    closing: Callable[[], bool] = lambda: False
    condemned: dict[Sample, str] = field(default_factory=dict)

    def make(self, item: WorkItem) -> Batch:
        """Raises WorkerError or ReadError when it cannot be made, and what its making raises."""
        self._crashes: Counter[Sample] = Counter()
        self._process: WorkerProcess | None = None
        self._starting: Activity | None = None
        try:
            return join(
                [self._row(replace(item, start=row, stop=row + 1)) for row in range(item.start, item.stop)]
            )
        finally:
            if self._process is not None:
                self._process.end()

    def _row(self, item: WorkItem) -> Batch:
        endings: list[str] = []
        stalls: list[str] = []
        while True:
            if self.closing():
                raise Closed
            if self._process is None:
                self._process, self._starting = WorkerProcess(self.file), starting()
            process = self._process
            process.ask(WorkMessage(0, item, condemned={item.stream: self.condemned}))
            found = self._answer(process)
            if isinstance(found, Batch):
                return found
            if isinstance(found, Exception):
                raise found
            self._process = None
            doing, ended = process.look(), process.end()
            if found is not None:
                stalls.append(found)
            elif (
                ended in CRASHES and doing.url is None and doing.sample and doing.sample not in self.condemned
            ):
                self._crashes[doing.sample] += 1
                if self._crashes[doing.sample] >= VERDICT:
                    self.condemned[doing.sample] = CRASHED
            else:
                endings.append(ending(ended))
            if len(stalls) >= VERDICT:
                raise stalled(item, stalls[-1])
            if len(endings) >= ISOLATION_TRIES:
                raise killed(item, endings)

    def _answer(self, process: WorkerProcess) -> Any:
        """A batch or an error; in words, what takes too long; None if the process is dead."""
        watch = StallWatch(self.limits, f"worker {process.pid}", lambda sample: place(self.setups, sample))
        with selectors.PollSelector() as selector:
            selector.register(process, selectors.EVENT_READ)
            while True:
                while not selector.select(min(LOOK, self.limits.warn)):
                    if self.closing():
                        raise Closed
                    told = watch.see(self._starting or process.look())
                    if told:
                        return told
                try:
                    number, found = process.answer()
                except (EOFError, ConnectionError):
                    return None
                if number != READY:
                    return found
                self._starting = None


def starting() -> Activity:
    """What a process does that was started now, until it says that it is ready."""
    return Activity("the program and the indexes of the sources, to start", time.monotonic())


def place(setups: list[BuilderSetup], sample: Sample) -> str:
    """A sample in words."""
    source, shard, index = sample
    for setup in setups:
        if source in setup.manifests:
            return f"sample {index} of {setup.manifests[source].url(shard)}"
    return f"sample {index} of shard {shard} of {source}"


def stalled(item: WorkItem, what: str) -> OSError:
    """The error for rows of which several processes in turn stood still at the same thing."""
    if what.startswith("reading "):
        return ReadError(
            f"{_rows(item)}: two workers of the loader have been {what} (loader.stall_error). Nothing was replaced; "
            "run again once it can be read"
        )
    return WorkerError(
        f"{_rows(item)}: two workers of the loader have been {what} (loader.stall_error). A time-out is no verdict on "
        "a sample, so nothing was replaced; look at that sample, or raise loader.stall_error"
    )


def killed(item: WorkItem, endings: list[str]) -> WorkerError:
    """The error for a row whose processes were ended, not by a crash of the decoder."""
    return WorkerError(
        f"{_rows(item)}: {len(endings)} processes of the loader ended while they made it alone ({', '.join(endings)}). "
        "Nothing was replaced. SIGKILL mostly means that memory ran out: set fewer loader.workers, a smaller "
        "train.micro_batch or data.STREAM.image.max_pixels, or ask for more memory"
    )


def _rows(item: WorkItem) -> str:
    rows = f"row {item.start}" if item.stop == item.start + 1 else f"rows {item.start} to {item.stop - 1}"
    return f"step {item.step}, {rows} of stream {item.stream}"
