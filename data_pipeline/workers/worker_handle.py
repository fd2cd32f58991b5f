"""Worker process of the loader, parent side: start it, send work, receive results, inspect its activity, kill it."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import replace
from mmap import mmap
from typing import Any

from data_pipeline import activity
from data_pipeline.activity import Activity
from data_pipeline.batches.work_items import BuilderSetup
from data_pipeline.child_process import start_module
from data_pipeline.workers.ipc import anonymous_file, has_anonymous_memory, receive, send, write_shared
from data_pipeline.workers.shared_memory import SharedBuffer
from data_pipeline.workers.worker import WorkMessage

# A worker uses one thread; several workers share the cores.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class SetupFile:
    """An anonymous file with the builder setups, written once and read by every worker.

    folders: where the modules of their text formats are
    """

    def __init__(self, setups: Sequence[BuilderSetup]) -> None:
        """Raises UserError for a text format that no other process can import."""
        folders = {setup.import_folder() for setup in setups}
        self.folders = sorted(folder for folder in folders if folder is not None)
        self.descriptor = write_shared(list(setups))

    def close(self) -> None:
        os.close(self.descriptor)


class WorkerProcess:
    """One running worker. The kernel kills it when the thread that started it ends."""

    def __init__(self, setups: SetupFile) -> None:
        self._channel, child_channel = socket.socketpair()
        self._status: mmap | None = None
        self._buffers: set[int] = set()
        self._known_bad_sent = 0
        status = -1
        if has_anonymous_memory():
            status = anonymous_file(activity.STATUS_BYTES, "dromos-status")
            self._status = mmap(status, activity.STATUS_BYTES)
        descriptors = (child_channel.fileno(), setups.descriptor, status)
        try:
            self._process = start_module(
                "data_pipeline.workers.worker",
                descriptors,
                dict.fromkeys(THREAD_VARIABLES, "1"),
                setups.folders,
            )
        finally:
            child_channel.close()
            if status >= 0:
                os.close(status)

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        """File descriptor of the channel, so that a selector accepts this object."""
        return self._channel.fileno()

    def send(
        self, work: WorkMessage, buffer: SharedBuffer | None = None, alive: Container[int] | None = None
    ) -> None:
        """Send work, with the file of its buffer if the worker does not have it yet.

        The worker drops all buffers whose numbers are not in `alive` (None: it keeps all). Does not raise for a dead
        worker; `receive` does.
        """
        descriptors: list[int] = []
        if buffer is not None and buffer.number not in self._buffers:
            descriptors = [buffer.descriptor]
            self._buffers.add(buffer.number)
        gone = {number for number in self._buffers if alive is not None and number not in alive}
        self._buffers -= gone
        # Samples are only ever added, so a larger number means that there are new ones.
        count = sum(map(len, work.known_bad.values()))
        known_bad = work.known_bad if count > self._known_bad_sent else {}
        self._known_bad_sent = count
        with suppress(ConnectionError):
            send(self._channel, replace(work, forget=tuple(gone), known_bad=known_bad), descriptors)

    def receive(self) -> tuple[int, Any]:
        """(number, batch or error). Raises EOFError or ConnectionError if the worker is dead."""
        answer: tuple[int, Any] = receive(self._channel)[0]
        return answer

    def inspect(self) -> Activity:
        """The worker's current activity, or its last one if it is dead."""
        return activity.read_status(self._status) if self._status is not None else Activity()

    def kill(self) -> int:
        """Kill the worker if it still runs. Returns its exit code, or minus the number of the signal that ended it."""
        self._channel.close()
        self._process.kill()
        return self._process.wait()


def describe_exit(code: int) -> str:
    """`signal SIGKILL` or `exit code 1`."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
