"""A process beside a rank's loader that fetches the next windows of remote sources at the rate at which they drain.

Started as `python -m data_pipeline.prefetch CHANNEL PARENT`, like a worker. What is needed when comes from the order
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
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline import storage
from data_pipeline.batches import BatchMaker
from data_pipeline.cache import ByteRange, Cache
from data_pipeline.channel import receive, send
from data_pipeline.errors import UserError
from data_pipeline.manifest import Manifest
from data_pipeline.object_store import CONNECTIONS
from data_pipeline.remote import Units, fetch
from data_pipeline.source_order import SHORT, WINDOW
from data_pipeline.work import Setup, rows_of
from data_pipeline.worker import die_with

AT_ONCE = CONNECTIONS // 2
LEAST_AHEAD = 4  # steps; workers are at two of them
ALONE = (
    200  # of so many samples of an epoch, one may be fetched by itself while the first window is on its way
)
STARTS = 3


@dataclass(frozen=True)
class Position:
    """The steps that a loader is to serve, and the one that it serves."""

    first: int
    last: int
    at: int


class Plan:
    """Which units a rank's rows need from which step to which, and when they may be fetched.

    Holds what is planned for the steps ahead to `limit_bytes`.
    """

    def __init__(self, makers: Sequence[BatchMaker], rank: int, world_size: int, limit_bytes: int) -> None:
        self._makers = [maker for maker in makers if prefetched(maker.manifests.values())]
        self._rank, self._world_size = rank, world_size
        self._limit = limit_bytes
        self._units = {
            (maker.spec.name, name): units
            for maker in self._makers
            for name, manifest in maker.manifests.items()
            if prefetched([manifest]) and (units := maker.units(name)) is not None
        }
        self._last_use: dict[ByteRange, int] = {}
        self._ending: dict[int, set[ByteRange]] = {}
        self.held = 0

    def ahead(self, step: int) -> int:
        """Steps that a window lasts in the lane where it lasts longest."""
        return max([LEAST_AHEAD, *(self._window_steps(maker, step) for maker in self._makers)])

    def alone(self, step: int) -> int:
        """Steps for which samples may be fetched one by one."""
        counts = [maker.order.samples_per_epoch() // ALONE // maker.spec.rows(step) for maker in self._makers]
        return max(1, min(counts, default=1))

    def full(self) -> bool:
        """Is as much planned as may be held?"""
        return self.held >= self._limit

    def served(self, step: int) -> None:
        """Let go of units that no planned step from `step` on needs."""
        for past in [end for end in self._ending if end < step]:
            for part in self._ending.pop(past):
                del self._last_use[part]
                self.held -= part.stop - part.start

    def needs(self, step: int) -> Iterator[ByteRange]:
        """Units that `step` needs and no planned step before it, in order of the rows. Steps are planned in order."""
        for maker in self._makers:
            if maker.order.last_step is not None and step >= maker.order.last_step:
                continue
            refs = maker.order.refs(step, *rows_of(self._rank, self._world_size, maker.spec.rows(step)))
            for number, name in enumerate(maker.names):
                units = self._units.get((maker.spec.name, name))
                if units is None:
                    continue
                rows = np.flatnonzero(refs.source == number)
                for part in _parts(units, refs.shard[rows], refs.index[rows]):
                    if self._use(part, step):
                        yield part

    def _use(self, part: ByteRange, step: int) -> bool:
        before = self._last_use.get(part)
        if before is None:
            self.held += part.stop - part.start
        else:
            self._ending[before].discard(part)
        self._last_use[part] = step
        self._ending.setdefault(step, set()).add(part)
        return before is None

    def _window_steps(self, maker: BatchMaker, step: int) -> int:
        order = maker.order
        per_lane = maker.spec.rows(step) / order.lanes
        longest = 0.0
        for source, weight in zip(order.sources, order.weights, strict=True):
            if weight and (maker.spec.name, source.name) in self._units:
                window = WINDOW * source.run if source.windows else source.samples / source.pieces
                window = min(window, SHORT * WINDOW * source.run)
                longest = max(longest, window * sum(order.weights) / (weight * per_lane))
        return int(longest) + 1


def _parts(units: Units, shards: np.ndarray, indices: np.ndarray) -> Iterator[ByteRange]:
    """The units that samples lie in, each once, in order of first use."""
    numbers = units.number(shards, indices)
    _, first = np.unique(np.stack([shards, numbers]), axis=1, return_index=True)
    first.sort()
    known = np.array([units.offsets.knows(int(shard)) for shard in shards[first]], bool)
    first = first[known]
    starts, stops = units.ranges(shards[first], numbers[first])
    for shard, start, stop in zip(shards[first].tolist(), starts.tolist(), stops.tolist(), strict=True):
        yield units.part(shard, start, stop)


def prefetched(manifests: Iterable[Manifest]) -> bool:
    """Is there a source among these that can be fetched ahead: remote, and its samples' places known?"""
    return any(storage.is_remote(manifest.root) and manifest.offsets is not None for manifest in manifests)


class Worker:
    """What the process does: plans as the loader goes on, and fetches what is planned."""

    def __init__(self, setups: Sequence[Setup], rank: int, world_size: int) -> None:
        makers = [setup.maker() for setup in setups]
        cache = next(setup.cache for setup in setups if setup.cache is not None)
        self._cache = Cache(cache)
        local = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self._limit = cache.limit_bytes // (2 * local)
        self._plan_of = lambda: Plan(makers, rank, world_size, self._limit)
        self._changed = threading.Condition()
        self._position: Position | None = None
        self._under_way = 0
        self._warned = False

    def move(self, position: Position) -> None:
        """The loader is there now."""
        with self._changed:
            self._position = position
            self._changed.notify_all()

    def run(self) -> None:
        """Fetch for ever."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._position is not None)
                    position = self._position
                assert position is not None
                self._follow(pool, position)

    def _follow(self, pool: ThreadPoolExecutor, begun: Position) -> None:
        """Plan one pass of the loader over its steps, until it begins another."""
        plan, step = self._plan_of(), begun.first
        window = begun.first + plan.ahead(begun.first)
        alone = begun.first + plan.alone(begun.first)
        while True:
            with self._changed:
                position = self._position
                assert position is not None
                if (position.first, position.last) != (begun.first, begun.last):
                    return
                plan.served(position.at)
                far = min(position.last, position.at + plan.ahead(position.at))
                stuck = plan.full() or step >= far
                if plan.full() and step < far:
                    self._warn()
                if position.at >= alone or (not self._under_way and (stuck or step >= window)):
                    self._cache.set_warming(False)
                if self._under_way >= 2 * AT_ONCE or stuck:
                    self._changed.wait()
                    continue
            for part in plan.needs(step):
                with self._changed:
                    self._under_way += 1
                pool.submit(self._fetch, part)
            step += 1

    def _fetch(self, part: ByteRange) -> None:
        try:
            with suppress(OSError, UserError):
                if not self._cache.has(part):
                    fetch(self._cache, part)
        finally:
            with self._changed:
                self._under_way -= 1
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

    def __init__(self, setups: Sequence[Setup], rank: int, world_size: int) -> None:
        self._given = (list(setups), rank, world_size)
        self._caches = [Cache(setup.cache) for setup in setups if setup.cache is not None]
        self._starts = 0
        self._position: Position | None = None
        for cache in self._caches:
            cache.sweep()
            cache.set_warming(True)
        self._start()

    @staticmethod
    def of(setups: Sequence[Setup], rank: int, world_size: int) -> Prefetcher | None:
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
        root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "data_pipeline.prefetch",
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
        worker = Worker(*receive(channel)[0])
        threading.Thread(target=worker.run, daemon=True).start()
        while True:
            worker.move(receive(channel)[0])
    except (EOFError, ConnectionError):
        os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
