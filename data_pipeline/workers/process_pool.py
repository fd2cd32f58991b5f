"""Pool of worker processes; dead or stalled ones are replaced and their slices rebuilt. Pixels are in shared memory.

An item is split into slices, so that several workers build one batch. Slices are handed out in the order in which they
are needed. A slice whose worker died goes to another worker. After two workers died while they built a slice, it is
rebuilt row by row in isolation (isolation.py).
"""

from __future__ import annotations

import selectors
import socket
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import prod

from data_pipeline.activity import Activity, Sample
from data_pipeline.batches.spec import Batch
from data_pipeline.batches.work_items import BuilderSetup, WorkItem, join_batches, pixel_shape, split_item
from data_pipeline.errors import WorkerError
from data_pipeline.workers.failures import (
    MAX_SLICE_DEATHS,
    MAX_SLICE_STALLS,
    POLL_SECONDS,
    describe_sample,
    stall_error,
    startup_activity,
)
from data_pipeline.workers.isolation import Isolation, PoolClosed
from data_pipeline.workers.shared_memory import SharedBuffer, SharedBufferPool
from data_pipeline.workers.watchdog import Stall, StallLimits, StallWatch
from data_pipeline.workers.worker import READY, WorkMessage
from data_pipeline.workers.worker_handle import SetupFile, WorkerProcess, describe_exit

# Slices sent to one worker: the one it builds, and the next, so that it never waits for this process.
SLICES_PER_WORKER = 2
# Failed starts per worker before an error is raised: the installation is broken, or there is too little memory.
MAX_FAILED_STARTS = 3


@dataclass
class _Job:
    """A submitted item: the result of each slice (None: not built yet), and the memory for its pixels."""

    item: WorkItem
    results: list[Batch | Exception | None]
    buffer: SharedBuffer | None = None
    is_allocated: bool = False
    running: int = 0
    is_cancelled: bool = False

    @property
    def is_done(self) -> bool:
        return all(result is not None for result in self.results)


@dataclass
class _Slice:
    job: _Job
    position: int
    item: WorkItem
    deaths: int = 0
    stalls: int = 0


@dataclass
class _Worker:
    """A running worker. `startup` is its activity until it is ready; `slices`: message number -> slice, in order."""

    process: WorkerProcess
    watch: StallWatch
    startup: Activity | None = field(default_factory=startup_activity)
    slices: dict[int, _Slice] = field(default_factory=dict)


class ProcessPool:
    """Worker processes behind sockets. One thread manages them and reads each result as soon as it arrives.

    That thread also starts the workers, because the kernel kills a worker when the thread that started it ends.
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
        self._queue: deque[_Slice] = deque()
        self._jobs: dict[int, _Job] = {}
        self._buffers = SharedBufferPool()
        self._file = SetupFile(self._setups)
        self._known_bad: dict[str, dict[Sample, str]] = {}
        self._isolation_threads: list[threading.Thread] = []
        self._failed_starts = 0
        self._next_ticket = self._next_number = 0
        self._closing = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="dromos-loader", daemon=True)
        self._thread.start()

    @property
    def pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [worker.process.pid for worker in list(self._workers)]

    @property
    def buffer_count(self) -> int:
        """Number of shared buffers: those being filled, those that batches still use, and the free ones."""
        return len(self._buffers.alive)

    def submit(self, item: WorkItem, slices: int = 1) -> int:
        items = split_item(item, self._specs[item.stream], slices)
        job = _Job(item, [None] * len(items))
        with self._changed:
            ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
            self._jobs[ticket] = job
            self._queue += [_Slice(job, position, each) for position, each in enumerate(items)]
        self._wake()
        return ticket

    def result(self, ticket: int) -> Batch:
        with self._changed:
            job = self._jobs[ticket]
            self._changed.wait_for(lambda: job.is_done or self._failure or self._closing)
            if not job.is_done:
                kind = WorkerError if isinstance(self._failure, OSError) else RuntimeError
                raise kind(str(self._failure or "the loader is closed")) from self._failure
            del self._jobs[ticket]
            parts = [part for part in job.results if isinstance(part, Batch)]
            if len(parts) < len(job.results):
                self._cancel_job(job)
                raise next(part for part in job.results if isinstance(part, Exception))
            batch = join_batches(parts)
            if job.buffer is not None:
                shape = pixel_shape(self._specs[batch.stream], batch.stop - batch.start)
                batch.fields["pixels"] = self._buffers.hand_out(job.buffer, shape)
        return batch

    def cancel(self) -> None:
        with self._changed:
            self._queue.clear()
            for job in self._jobs.values():
                self._cancel_job(job)
            self._jobs.clear()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._wake()
        self._thread.join()

    def _cancel_job(self, job: _Job) -> None:
        """Mark a job as cancelled. Its memory is free once no worker writes to it any more."""
        job.is_cancelled = True
        if not job.running and job.buffer is not None:
            self._buffers.release(job.buffer)
            job.buffer = None

    def _wake(self) -> None:
        with suppress(OSError):
            self._wake_sender.send(b"!")

    def _run(self) -> None:
        try:
            while not self._closing:
                self._start_workers()
                self._assign_slices()
                self._receive_results()
                self._check_stalls()
        except WorkerError as error:
            self._failure = error
        except OSError as error:
            self._failure = WorkerError(f"cannot start loader workers or receive from them: {error}")
        except BaseException as error:
            self._failure = error
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            self._shut_down()

    def _start_workers(self) -> None:
        while len(self._workers) < self._count:
            process = WorkerProcess(self._file)
            watch = StallWatch(
                self._limits, f"worker {process.pid}", lambda sample: describe_sample(self._setups, sample)
            )
            self._workers.append(_Worker(process, watch))

    def _assign_slices(self) -> None:
        while True:
            worker = min(self._workers, key=lambda each: len(each.slices))
            with self._changed:
                if len(worker.slices) >= SLICES_PER_WORKER or not self._queue:
                    return
                job_slice = self._queue.popleft()
                self._acquire_buffer(job_slice.job)
                number, self._next_number = self._next_number, self._next_number + 1
                worker.slices[number] = job_slice
                job_slice.job.running += 1
                known_bad = {stream: dict(samples) for stream, samples in self._known_bad.items()}
            work = WorkMessage(number, job_slice.item, known_bad=known_bad)
            buffer = job_slice.job.buffer
            if buffer is not None:
                work = replace(work, buffer=buffer.number, offset=self._offset(job_slice), size=buffer.size)
            worker.process.send(work, buffer, self._buffers.alive)

    def _offset(self, job_slice: _Slice) -> int:
        """Byte offset of the slice's pixels in the item's pixels."""
        return prod(
            pixel_shape(self._specs[job_slice.item.stream], job_slice.item.start - job_slice.job.item.start)
        )

    def _acquire_buffer(self, job: _Job) -> None:
        """Give a job memory for its pixels when its first slice is handed out."""
        if not job.is_allocated:
            shape = pixel_shape(self._specs[job.item.stream], job.item.stop - job.item.start)
            job.buffer, job.is_allocated = self._buffers.acquire(prod(shape)), True
            self._buffers.trim(len(self._jobs))

    def _receive_results(self) -> None:
        """Wait for results, new work or dead workers; with a time-out while workers are busy, to check for stalls."""
        is_busy = any(worker.slices for worker in self._workers)
        with selectors.PollSelector() as selector:  # select() fails beyond 1024 open files
            selector.register(self._wake_receiver, selectors.EVENT_READ)
            for worker in self._workers:
                selector.register(worker.process, selectors.EVENT_READ, worker)
            timeout = min(POLL_SECONDS, self._limits.warn) if is_busy else None
            ready = [key.data for key, _ in selector.select(timeout)]
        for worker in ready:
            if worker is None:
                self._wake_receiver.recv(4096)
                continue
            try:
                number, result = worker.process.receive()
            except (EOFError, ConnectionError):
                self._replace_worker(worker)
                continue
            if number == READY:
                worker.startup = None
            else:
                self._failed_starts = 0
                self._store_result(worker.slices.pop(number), result)

    def _store_result(self, job_slice: _Slice, result: Batch | Exception) -> None:
        with self._changed:
            job = job_slice.job
            job.running -= 1
            job.results[job_slice.position] = result
            if job.is_cancelled:
                self._cancel_job(job)
            elif job.is_done:
                self._changed.notify_all()

    def _check_stalls(self) -> None:
        for worker in list(self._workers):
            if worker.slices:
                stall = worker.watch.check(worker.startup or worker.process.inspect())
                if stall is not None:
                    self._replace_worker(worker, stall)

    def _replace_worker(self, worker: _Worker, stall: Stall | None = None) -> None:
        """Requeue the slices of a dead or stalled worker at the head of the queue.

        The failure count of the slice it was building goes up by one. `_start_workers` starts the new worker.
        """
        self._workers.remove(worker)
        exit_code = worker.process.kill()
        current = next(iter(worker.slices.values()), None)
        if current is not None and stall is not None:
            current.stalls += 1
        elif current is not None and worker.startup is None:
            current.deaths += 1
        else:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS * self._count:
                raise WorkerError(
                    f"loader workers die while they start ({describe_exit(exit_code)}); after SIGKILL, which usually "
                    "means out of memory, lower loader.workers (in Python: workers)"
                )
        for job_slice in reversed(worker.slices.values()):
            if job_slice.stalls >= MAX_SLICE_STALLS and stall is not None:
                self._store_result(job_slice, stall_error(job_slice.item, stall))
            elif job_slice.deaths >= MAX_SLICE_DEATHS:
                self._start_isolation(job_slice)
            else:
                self._requeue(job_slice)

    def _requeue(self, job_slice: _Slice) -> None:
        with self._changed:
            job_slice.job.running -= 1
            if job_slice.job.is_cancelled:
                self._cancel_job(job_slice.job)
            else:
                self._queue.appendleft(job_slice)

    def _start_isolation(self, job_slice: _Slice) -> None:
        """Rebuild a slice row by row in a thread of its own, so that the other workers continue."""
        thread = threading.Thread(
            target=self._make_isolated, args=(job_slice,), name="dromos-isolation", daemon=True
        )
        self._isolation_threads.append(thread)
        thread.start()

    def _make_isolated(self, job_slice: _Slice) -> None:
        isolation = Isolation(self._setups, self._file, self._limits, lambda: self._closing)
        result: Batch | Exception
        try:
            result = isolation.make(job_slice.item)
            self._move_pixels(job_slice, result)
        except PoolClosed:
            return
        except Exception as error:
            result = error
        with self._changed:
            for sample, reason in isolation.known_bad.items():
                self._known_bad.setdefault(job_slice.item.stream, {})[sample] = reason
        self._store_result(job_slice, result)

    def _move_pixels(self, job_slice: _Slice, batch: Batch) -> None:
        """Move pixels that came through a socket to the buffer of the item's other slices."""
        job = job_slice.job
        if job.buffer is not None and "pixels" in batch.fields:
            begin, flat = self._offset(job_slice), batch.fields.pop("pixels").reshape(-1)
            job.buffer.array(begin + flat.size)[begin:] = flat

    def _shut_down(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for thread in self._isolation_threads:
            thread.join()
        self._workers.clear()
        self._buffers.close()
        self._file.close()
        self._wake_receiver.close()
        self._wake_sender.close()
