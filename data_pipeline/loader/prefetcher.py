"""A process beside a rank's loader that fetches the next windows of remote sources at the rate at which they drain.

Started as `python -m data_pipeline.loader.prefetcher CHANNEL PARENT`, like a worker.
What is needed when comes from the order
alone, so mixtures, resumed runs and accepted changes are nothing special. It fetches into the node's cache and tells
nobody: whoever misses a unit there fetches it himself, and it is he who says what cannot be read.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data_pipeline.batches.work_items import BuilderSetup
from data_pipeline.child_process import die_with
from data_pipeline.errors import UserError
from data_pipeline.loader.prefetch_plan import Plan, prefetched
from data_pipeline.storage.cache import ByteRange, Cache
from data_pipeline.storage.cached_ranges import fetch
from data_pipeline.storage.object_store import CONNECTIONS
from data_pipeline.workers.ipc import receive, send

PARALLEL_FETCHES = CONNECTIONS // 2
FILLED = 0.75  # share of the cache that the ranks of a node fill ahead
STARTS = 3


@dataclass(frozen=True)
class Position:
    """The steps that a loader is to serve, and the one that it serves."""

    first: int
    last: int
    at: int


class Worker:
    """What the process does: plans as the loader goes on, and fetches what is planned."""

    def __init__(self, setups: Sequence[BuilderSetup], rank: int, world_size: int) -> None:
        self._makers = [setup.builder() for setup in setups]
        self._rank, self._world_size = rank, world_size
        cache = next(setup.cache for setup in setups if setup.cache is not None)
        self._cache = Cache(cache)
        ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self._limit = int(FILLED * cache.limit_bytes) // ranks
        self._changed = threading.Condition()
        self._position: Position | None = None
        self._under_way = 0
        self._changes = 0
        self._warned = False

    def move(self, position: Position) -> None:
        """The loader is there now."""
        with self._changed:
            self._position = position
            self._changes += 1
            self._changed.notify_all()

    def run(self) -> None:
        """Fetch for ever."""
        with ThreadPoolExecutor(PARALLEL_FETCHES) as pool:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._position is not None)
                    position = self._position
                assert position is not None
                self._follow(pool, position)

    def _follow(self, pool: ThreadPoolExecutor, begun: Position) -> None:
        """Plan one pass of the loader over its steps, until it begins another."""
        plan = Plan(self._makers, self._rank, self._world_size, self._limit, begun.first)
        alone = begun.first + plan.alone()
        while True:
            with self._changed:
                position, changes = self._position, self._changes
                room = 2 * PARALLEL_FETCHES - self._under_way
            assert position is not None
            if (position.first, position.last) != (begun.first, begun.last):
                return
            reach = plan.following(position.at, position.last)
            if reach is not None:
                plan.look(reach)
            else:
                for part in plan.served(position.at):
                    self._cache.release(part)
            parts = list(islice(iter(plan.take, None), max(0, room)))
            for part in parts:
                self._submit(pool, part)
            if position.at >= alone or (reach is None and not parts and room == 2 * PARALLEL_FETCHES):
                self._cache.set_warming(False)
            if reach is None and not parts:
                if room > 0 and plan.full:
                    self._warn()
                with self._changed:
                    while self._changes == changes:
                        self._changed.wait()

    def _submit(self, pool: ThreadPoolExecutor, part: ByteRange) -> None:
        with self._changed:
            self._under_way += 1
        pool.submit(self._fetch, part)

    def _fetch(self, part: ByteRange) -> None:
        try:
            with suppress(OSError, UserError):
                if not self._cache.has(part):
                    fetch(self._cache, part)
        finally:
            with self._changed:
                self._under_way -= 1
                self._changes += 1
                self._changed.notify_all()

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"what the next window of samples needs is more than the {self._limit} bytes of the cache that this "
                "rank may fill ahead, so that some of it may be fetched twice; raise loader.cache.gigabytes",
                stacklevel=2,
            )


class Prefetcher:
    """The process, as the loader that it works for holds it."""

    def __init__(self, setups: Sequence[BuilderSetup], rank: int, world_size: int) -> None:
        self._given = (list(setups), rank, world_size)
        self._caches = [Cache(setup.cache) for setup in setups if setup.cache is not None]
        self._starts = 0
        self._position: Position | None = None
        for cache in self._caches:
            cache.sweep()
            cache.set_warming(True)
        self._start()

    @staticmethod
    def of(setups: Sequence[BuilderSetup], rank: int, world_size: int) -> Prefetcher | None:
        """Started, if these streams have something to fetch ahead and somewhere to keep it."""
        useful = [
            setup
            for setup in setups
            if setup.cache is not None and prefetched(setup.manifests.values()) and not Cache(setup.cache).off
        ]
        return Prefetcher(useful, rank, world_size) if useful else None

    @property
    def pid(self) -> int:
        return self._process.pid

    def begin(self, first: int, last: int) -> None:
        """The loader is to serve steps first, ..., last - 1."""
        self._tell(Position(first, last, first))

    def at(self, step: int) -> None:
        """The loader serves `step` now. A prefetcher that was killed is started again, a few times."""
        assert self._position is not None
        if self._process.poll() is not None:
            if self._starts == STARTS:
                self._cool()
                return
            self._channel.close()
            self._start()
        self._tell(Position(self._position.first, self._position.last, step))

    def close(self) -> None:
        self._channel.close()
        self._process.kill()
        self._process.wait()
        self._cool()

    def _cool(self) -> None:
        for cache in self._caches:
            cache.set_warming(False)

    def _tell(self, position: Position) -> None:
        self._position = position
        with suppress(OSError):
            send(self._channel, position)

    def _start(self) -> None:
        self._starts += 1
        self._channel, theirs = socket.socketpair()
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "data_pipeline.loader.prefetcher",
                    str(theirs.fileno()),
                    str(os.getpid()),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path},
            )
        with suppress(OSError):
            send(self._channel, self._given)


def main(descriptor: int, parent: int) -> None:
    # Ctrl-C and Slurm's warning go to every process of the job; it is the trainer that ends this one.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    die_with(parent)
    channel = socket.socket(fileno=descriptor)
    try:
        given = receive(channel)[0]
        try:
            worker = Worker(*given)
        except (OSError, UserError) as error:
            print(f"nothing is fetched ahead: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        threading.Thread(target=_run, args=(worker,), daemon=True).start()
        while True:
            worker.move(receive(channel)[0])
    except (EOFError, ConnectionError):
        os._exit(0)


def _run(worker: Worker) -> None:
    """A process that no longer fetches ends: readers would else wait for its first window, one sample at a time."""
    try:
        worker.run()
    finally:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
