"""A worker process as its parent holds it: started, given work, looked at, and ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import replace
from mmap import mmap
from pathlib import Path
from typing import Any

from data_pipeline import activity
from data_pipeline.activity import Activity
from data_pipeline.batches.work_items import BuilderSetup
from data_pipeline.workers.ipc import anonymous_file, has_anonymous_memory, receive, send, shared_message
from data_pipeline.workers.shared_memory import SharedBuffer
from data_pipeline.workers.worker import WorkMessage

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class SetupFile:
    """Setups, written once into an open file without a name that every worker reads."""

    def __init__(self, setups: Sequence[BuilderSetup]) -> None:
        self.descriptor = shared_message(list(setups))

    def close(self) -> None:
        os.close(self.descriptor)


class WorkerProcess:
    """One running worker. It ends with the thread that started it, at the latest."""

    def __init__(self, setups: SetupFile) -> None:
        self._channel, theirs = socket.socketpair()
        self._status: mmap | None = None
        self._slabs: set[int] = set()
        self._told = 0
        status = -1
        if has_anonymous_memory():
            status = anonymous_file(activity.SIZE, "dromos-status")
            self._status = mmap(status, activity.SIZE)
        given = (theirs.fileno(), setups.descriptor, status)
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "data_pipeline.workers.worker",
                    *map(str, given),
                    str(os.getpid()),
                ],
                pass_fds=[descriptor for descriptor in given if descriptor >= 0],
                stdin=subprocess.DEVNULL,
                env=os.environ | dict.fromkeys(THREADS, "1") | {"PYTHONPATH": path},
            )
        finally:
            theirs.close()
            if status >= 0:
                os.close(status)

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        """The channel's, for a selector."""
        return self._channel.fileno()

    def ask(
        self, work: WorkMessage, slab: SharedBuffer | None = None, alive: Container[int] | None = None
    ) -> None:
        """Send work, with the slab's file if it has not had it; a worker that is dead shows it in `answer`.

        alive: the slabs that there are; the worker forgets others
        """
        descriptors: list[int] = []
        if slab is not None and slab.number not in self._slabs:
            descriptors = [slab.descriptor]
            self._slabs.add(slab.number)
        gone = {number for number in self._slabs if alive is not None and number not in alive}
        self._slabs -= gone
        told = sum(map(len, work.condemned.values()))
        work = replace(work, forget=tuple(gone), condemned=work.condemned if told > self._told else {})
        self._told = told
        with suppress(ConnectionError):
            send(self._channel, work, descriptors)

    def answer(self) -> tuple[int, Any]:
        """(number, batch or error). Raises EOFError or ConnectionError when the process is gone."""
        found: tuple[int, Any] = receive(self._channel)[0]
        return found

    def look(self) -> Activity:
        """What it does, or was doing when it died."""
        return activity.read_status(self._status) if self._status is not None else Activity()

    def end(self) -> int:
        """Kill it, if it is not dead; its exit code, or minus the signal that ended it."""
        self._channel.close()
        self._process.kill()
        return self._process.wait()


def ending(status: int) -> str:
    """How a process ended, in words."""
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
