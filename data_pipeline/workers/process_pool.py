"""Items of work done by worker processes, which are replaced when they die; their pixels lie in shared memory.

An item is cut into slices, so that several workers make one batch; slices are handed out in the order in which they are
needed. A slice whose worker died is made by another; one that ended two is made row by row in isolation.
"""

from __future__ import annotations

import selectors
import signal
import socket
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import prod

from data_pipeline.activity import Activity, Sample
from data_pipeline.batches.spec import Batch
from data_pipeline.batches.work_items import BuilderSetup, WorkItem, cut, join, pixel_shape
from data_pipeline.errors import WorkerError
from data_pipeline.workers.isolation import LOOK, Closed, Isolation, place, stalled, starting
from data_pipeline.workers.shared_memory import SharedBuffer, SharedBufferPool
from data_pipeline.workers.watchdog import StallLimits, StallWatch
from data_pipeline.workers.worker import READY, WorkMessage
from data_pipeline.workers.worker_handle import SetupFile, WorkerProcess, ending

# Slices a worker holds: one in the making, one to go on with.
HELD = 2
# A worker may be killed by anything; a slice that ended two of them is made in isolation.
DEATHS = 2
# Deaths of workers that never got ready, for each worker: then something is wrong with the installation.
STILLBORN = 3
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass
class _Job:
    """An item that was asked for: what has come of its slices, and where its pixels lie."""

    item: WorkItem
    found: list[Batch | Exception | None]
    slab: SharedBuffer | None = None
    placed: bool = False
    running: int = 0
    wanted: bool = True

    @property
    def done(self) -> bool:
        return all(each is not None for each in self.found)


@dataclass
class _Slice:
    job: _Job
    position: int
    item: WorkItem
    deaths: int = 0
    stalls: int = 0


@dataclass
class _Worker:
    process: WorkerProcess
    watch: StallWatch
    starting: Activity | None = field(default_factory=starting)
    held: dict[int, _Slice] = field(default_factory=dict)


class ProcessPool:
    """Worker processes behind sockets, tended by one thread, which also reads results as soon as they are there.

    That thread starts the workers, because the kernel kills a worker when the thread that started it ends.
    """

    ahead = 2

    def __init__(
        self, setups: Sequence[BuilderSetup], workers: int, limits: StallLimits | None = None
    ) -> None:
        self._setups = list(setups)
        self._specs = {setup.spec.name: setup.spec for setup in setups}
        self._count = workers
        self._limits = limits or StallLimits()
        self._workers: list[_Worker] = []
        self._todo: deque[_Slice] = deque()
        self._jobs: dict[int, _Job] = {}
        self._slabs = SharedBufferPool()
        self._file = SetupFile(self._setups)
        self._condemned: dict[str, dict[Sample, str]] = {}
        self._isolating: list[threading.Thread] = []
        self._stillborn = 0
        self._next = self._number = 0
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

    @property
    def slabs(self) -> int:
        """Pieces of shared memory that there are now: in the making, seen by someone, and free."""
        return len(self._slabs.alive)

    def submit(self, item: WorkItem, pieces: int = 1) -> int:
        slices = cut(item, self._specs[item.stream], pieces)
        job = _Job(item, [None] * len(slices))
        with self._changed:
            ticket, self._next = self._next, self._next + 1
            self._jobs[ticket] = job
            self._todo += [_Slice(job, position, each) for position, each in enumerate(slices)]
        self._wake()
        return ticket

    def result(self, ticket: int) -> Batch:
        with self._changed:
            job = self._jobs[ticket]
            self._changed.wait_for(lambda: job.done or self._failure or self._closing)
            if not job.done:
                kind = WorkerError if isinstance(self._failure, OSError) else RuntimeError
                raise kind(str(self._failure or "the loader is closed")) from self._failure
            del self._jobs[ticket]
            parts = [part for part in job.found if isinstance(part, Batch)]
            if len(parts) < len(job.found):
                self._abandon(job)
                raise next(part for part in job.found if isinstance(part, Exception))
            batch = join(parts)
            if job.slab is not None:
                shape = pixel_shape(self._specs[batch.stream], batch.stop - batch.start)
                batch.pixels = self._slabs.hand_out(job.slab, shape)
        return batch

    def cancel(self) -> None:
        with self._changed:
            self._todo.clear()
            for job in self._jobs.values():
                self._abandon(job)
            self._jobs.clear()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._wake()
        self._thread.join()

    def _abandon(self, job: _Job) -> None:
        """Nobody waits for it. Its memory is free once no worker writes to it any more."""
        job.wanted = False
        if not job.running and job.slab is not None:
            self._slabs.give_back(job.slab)
            job.slab = None

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
                self._watch()
        except WorkerError as error:
            self._failure = error
        except OSError as error:
            self._failure = WorkerError(f"no more workers of the loader can be started or heard: {error}")
        except BaseException as error:
            self._failure = error
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            self._dismiss()

    def _hire(self) -> None:
        while len(self._workers) < self._count:
            process = WorkerProcess(self._file)
            watch = StallWatch(
                self._limits, f"worker {process.pid}", lambda sample: place(self._setups, sample)
            )
            self._workers.append(_Worker(process, watch))

    def _assign(self) -> None:
        while True:
            worker = min(self._workers, key=lambda each: len(each.held))
            with self._changed:
                if len(worker.held) >= HELD or not self._todo:
                    return
                piece = self._todo.popleft()
                self._place(piece.job)
                number, self._number = self._number, self._number + 1
                worker.held[number] = piece
                piece.job.running += 1
                condemned = {stream: dict(samples) for stream, samples in self._condemned.items()}
            work = WorkMessage(number, piece.item, condemned=condemned)
            slab = piece.job.slab
            if slab is not None:
                work = replace(work, slab=slab.number, offset=self._offset(piece), size=slab.size)
            worker.process.ask(work, slab, self._slabs.alive)

    def _offset(self, piece: _Slice) -> int:
        """Bytes of the item's pixels before this slice's."""
        return prod(pixel_shape(self._specs[piece.item.stream], piece.item.start - piece.job.item.start))

    def _place(self, job: _Job) -> None:
        """Give a job memory for its pixels when its first slice is handed out."""
        if not job.placed:
            shape = pixel_shape(self._specs[job.item.stream], job.item.stop - job.item.start)
            job.slab, job.placed = self._slabs.take(prod(shape)), True
            self._slabs.trim(len(self._jobs))

    def _collect(self) -> None:
        """Wait for something to happen, for a while only where somebody works, and take what workers made."""
        busy = any(worker.held for worker in self._workers)
        with selectors.PollSelector() as selector:  # select() fails beyond 1024 open files
            selector.register(self._bell, selectors.EVENT_READ)
            for worker in self._workers:
                selector.register(worker.process, selectors.EVENT_READ, worker)
            timeout = min(LOOK, self._limits.warn) if busy else None
            ready = [key.data for key, _ in selector.select(timeout)]
        for worker in ready:
            if worker is None:
                self._bell.recv(4096)
                continue
            try:
                number, found = worker.process.answer()
            except (EOFError, ConnectionError):
                self._bury(worker)
                continue
            if number == READY:
                worker.starting = None
            else:
                self._stillborn = 0
                self._finish(worker.held.pop(number), found)

    def _finish(self, piece: _Slice, found: Batch | Exception) -> None:
        with self._changed:
            job = piece.job
            job.running -= 1
            job.found[piece.position] = found
            if not job.wanted:
                self._abandon(job)
            elif job.done:
                self._changed.notify_all()

    def _watch(self) -> None:
        for worker in list(self._workers):
            if worker.held:
                told = worker.watch.see(worker.starting or worker.process.look())
                if told:
                    self._bury(worker, told)

    def _bury(self, worker: _Worker, stall: str | None = None) -> None:
        """Put the slices of a dead or stalled worker back in front; the one it was at has that to its name."""
        self._workers.remove(worker)
        ended = worker.process.end()
        first = next(iter(worker.held.values()), None)
        if first is not None and stall is not None:
            first.stalls += 1
        elif first is not None and worker.starting is None:
            first.deaths += 1
        else:
            self._stillborn += 1
            if self._stillborn >= STILLBORN * self._count:
                raise WorkerError(
                    f"workers of the loader end as soon as they start ({ending(ended)}); after SIGKILL, which mostly "
                    "means that memory ran out, set fewer loader.workers"
                )
        for piece in reversed(worker.held.values()):
            if piece.stalls >= DEATHS and stall is not None:
                self._finish(piece, stalled(piece.item, stall))
            elif piece.deaths >= DEATHS:
                self._isolate(piece)
            else:
                self._again(piece)

    def _again(self, piece: _Slice) -> None:
        with self._changed:
            piece.job.running -= 1
            if piece.job.wanted:
                self._todo.appendleft(piece)
            else:
                self._abandon(piece.job)

    def _isolate(self, piece: _Slice) -> None:
        """Make a slice in a thread of its own, whose processes may die without harm."""
        thread = threading.Thread(target=self._alone, args=(piece,), name="dromos-isolation", daemon=True)
        self._isolating.append(thread)
        thread.start()

    def _alone(self, piece: _Slice) -> None:
        isolation = Isolation(self._setups, self._file, self._limits, lambda: self._closing)
        found: Batch | Exception
        try:
            found = isolation.make(piece.item)
            self._deposit(piece, found)
        except Closed:
            return
        except Exception as error:
            found = error
        with self._changed:
            for sample, reason in isolation.condemned.items():
                self._condemned.setdefault(piece.item.stream, {})[sample] = reason
        self._finish(piece, found)

    def _deposit(self, piece: _Slice, batch: Batch) -> None:
        """Move pixels that came through a socket to where the item's other slices lie."""
        job = piece.job
        if job.slab is not None and batch.pixels is not None:
            begin, flat = self._offset(piece), batch.pixels.reshape(-1)
            job.slab.array(begin + flat.size)[begin:] = flat
            batch.pixels = None

    def _dismiss(self) -> None:
        for worker in self._workers:
            worker.process.end()
        for thread in self._isolating:
            thread.join()
        self._workers.clear()
        self._slabs.close()
        self._file.close()
        self._bell.close()
        self._ring.close()
