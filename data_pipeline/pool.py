"""Where items of work are done: in a thread, or in worker processes that are replaced when they die."""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from data_pipeline.batches import BatchMaker
from data_pipeline.spec import Batch
from data_pipeline.work import Item, Setup
from data_pipeline.worker import receive, send

# Items a worker holds: one in the making, one to go on with.
HELD = 2
# A worker may be killed by anything; an item that kills three of them is at fault itself.
DEATHS = 3
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Pool(Protocol):
    """Takes items, gives batches; `ahead` is how many steps it is worth asking for in advance."""

    ahead: int

    def submit(self, item: Item) -> int:
        """A ticket for the item's batch."""
        ...

    def result(self, ticket: int) -> Batch:
        """Wait for a batch, or raise the error that its making raised."""
        ...

    def cancel(self) -> None:
        """Forget all tickets."""
        ...

    def close(self) -> None:
        """Cancel and leave nothing running."""
        ...


class ThreadPool:
    """Makes batches inside this process, one step ahead."""

    ahead = 1

    def __init__(self, makers: Mapping[str, BatchMaker]) -> None:
        self._makers = makers
        self._thread = ThreadPoolExecutor(1, "dromos-loader")
        self._futures: dict[int, Future[Batch]] = {}
        self._next = 0

    def submit(self, item: Item) -> int:
        ticket, self._next = self._next, self._next + 1
        maker = self._makers[item.stream]
        self._futures[ticket] = self._thread.submit(maker.make, item.step, item.start, item.stop)
        return ticket

    def result(self, ticket: int) -> Batch:
        return self._futures.pop(ticket).result()

    def cancel(self) -> None:
        for future in self._futures.values():
            future.cancel()
        self._futures.clear()

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    channel: socket.socket
    held: dict[int, Item] = field(default_factory=dict)


class ProcessPool:
    """Worker processes behind sockets, tended by one thread, which also reads results as soon as they are there.

    That thread starts the workers, because the kernel kills a worker when the thread that started it ends.
    """

    ahead = 2

    def __init__(self, setups: Sequence[Setup], workers: int) -> None:
        self._setups = list(setups)
        self._count = workers
        self._workers: list[_Worker] = []
        self._todo: deque[tuple[int, Item]] = deque()
        self._done: dict[int, Batch | Exception] = {}
        self._wanted: set[int] = set()
        self._deaths: dict[int, int] = {}
        self._next = 0
        self._closing = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._bell, self._ring = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="dromos-loader", daemon=True)
        self._thread.start()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [worker.process.pid for worker in list(self._workers)]

    def submit(self, item: Item) -> int:
        with self._changed:
            ticket, self._next = self._next, self._next + 1
            self._todo.append((ticket, item))
            self._wanted.add(ticket)
        self._wake()
        return ticket

    def result(self, ticket: int) -> Batch:
        with self._changed:
            self._changed.wait_for(lambda: ticket in self._done or self._failure or self._closing)
            if ticket not in self._done:
                raise RuntimeError(str(self._failure or "the loader is closed")) from self._failure
            self._wanted.discard(ticket)
            found = self._done.pop(ticket)
        if isinstance(found, Exception):
            raise found
        return found

    def cancel(self) -> None:
        with self._changed:
            self._todo.clear()
            self._done.clear()
            self._wanted.clear()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._wake()
        self._thread.join()

    def _wake(self) -> None:
        with suppress(OSError):
            self._ring.send(b"!")

    def _run(self) -> None:
        # Workers inherit this thread's mask: a Ctrl-C that hits one while it starts must not print a trace.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            while not self._closing:
                self._hire()
                self._assign()
                self._collect()
        except BaseException as error:
            self._failure = error
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            self._dismiss()

    def _hire(self) -> None:
        new = [_start() for _ in range(self._count - len(self._workers))]
        self._workers += new
        for worker in new:
            with suppress(ConnectionError):  # dead already: _collect sees to it
                send(worker.channel, self._setups)

    def _assign(self) -> None:
        while True:
            worker = min(self._workers, key=lambda each: len(each.held))
            with self._changed:
                if len(worker.held) >= HELD or not self._todo:
                    return
                ticket, item = self._todo.popleft()
                worker.held[ticket] = item
            with suppress(ConnectionError):
                send(worker.channel, (ticket, item))

    def _collect(self) -> None:
        with selectors.PollSelector() as selector:  # select() fails beyond 1024 open files
            selector.register(self._bell, selectors.EVENT_READ)
            for worker in self._workers:
                selector.register(worker.channel, selectors.EVENT_READ, worker)
            ready = [key.data for key, _ in selector.select()]
        for worker in ready:
            if worker is None:
                self._bell.recv(4096)
                continue
            try:
                ticket, found = receive(worker.channel)
            except (EOFError, ConnectionError):
                self._bury(worker)
                continue
            with self._changed:
                worker.held.pop(ticket, None)
                self._deaths.pop(ticket, None)
                if ticket in self._wanted:
                    self._done[ticket] = found
                    self._changed.notify_all()

    def _bury(self, worker: _Worker) -> None:
        """Put a dead worker's items back in front; the item it was at has one more death to its name."""
        self._workers.remove(worker)
        worker.channel.close()
        worker.process.kill()
        status = worker.process.wait()
        with self._changed:
            for ticket in sorted(worker.held, reverse=True):
                if ticket in self._wanted:
                    self._todo.appendleft((ticket, worker.held[ticket]))
            if not worker.held:
                self._deaths[-1] = self._deaths.get(-1, 0) + 1
                if self._deaths[-1] >= DEATHS * self._count:
                    raise RuntimeError(f"workers of the loader end as soon as they start ({_ending(status)})")
                return
            ticket = min(worker.held)
            self._deaths[ticket] = self._deaths.get(ticket, 0) + 1
            if self._deaths[ticket] >= DEATHS and ticket in self._wanted:
                self._todo.popleft()
                self._done[ticket] = RuntimeError(
                    f"{worker.held[ticket]} ended {DEATHS} workers of the loader ({_ending(status)}); "
                    "if that is for want of memory, set fewer loader.workers or a smaller train.micro_batch"
                )
                self._changed.notify_all()

    def _dismiss(self) -> None:
        for worker in self._workers:
            worker.channel.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
        self._workers.clear()
        self._bell.close()
        self._ring.close()


def _start() -> _Worker:
    ours, theirs = socket.socketpair()
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    command = [sys.executable, "-P", "-m", "data_pipeline.worker", str(theirs.fileno()), str(os.getpid())]
    with theirs:
        process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=os.environ | dict.fromkeys(THREADS, "1") | {"PYTHONPATH": path},
        )
    return _Worker(process, ours)


def _ending(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
