"""Process beside a rank's local loader that downloads the next windows of remote sources into the node cache.

It stays one window ahead of the loader. Only the order determines which bytes are needed at each step, so mixtures,
resumed runs and changed data need no special case. The prefetcher reports no read errors: a reader that misses a unit
in the cache fetches it itself, and raises the error. `loader.backend: ray` has no prefetcher.

Started as `python -m data_pipeline.loader.prefetcher CHANNEL PARENT`, like a worker process.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

from data_pipeline.batches.work_items import BuilderSetup
from data_pipeline.child_process import die_with, start_module
from data_pipeline.errors import UserError
from data_pipeline.loader.prefetch_plan import PrefetchPlan, can_prefetch
from data_pipeline.storage.cache import ByteRange, Cache
from data_pipeline.storage.cached_ranges import fetch
from data_pipeline.storage.object_store import CONNECTIONS
from data_pipeline.workers.ipc import receive, send

PARALLEL_FETCHES = CONNECTIONS // 2
CACHE_SHARE = 0.75  # fraction of the cache limit that all prefetchers of a node may fill
MAX_STARTS = 3


@dataclass(frozen=True)
class Position:
    """The loader serves steps first, ..., last - 1; `step` is the current one."""

    first: int
    last: int
    step: int


class _Downloader:
    """Runs in the prefetcher process: plans as the loader advances, and fetches the planned units."""

    def __init__(self, setups: Sequence[BuilderSetup], rank: int, world_size: int) -> None:
        self._builders = [setup.builder() for setup in setups]
        self._rank, self._world_size = rank, world_size
        cache = next(setup.cache for setup in setups if setup.cache is not None)
        self._cache = Cache(cache)
        ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self._limit = int(CACHE_SHARE * cache.limit_bytes) // ranks
        self._changed = threading.Condition()
        self._position: Position | None = None
        self._in_flight = 0
        self._changes = 0
        self._warned = False

    def set_position(self, position: Position) -> None:
        """Pass the loader's new position to the planning thread."""
        with self._changed:
            self._position = position
            self._changes += 1
            self._changed.notify_all()

    def run(self) -> None:
        """Plan and fetch until the process ends."""
        with ThreadPoolExecutor(PARALLEL_FETCHES) as pool:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._position is not None)
                    position = self._position
                assert position is not None
                self._serve_pass(pool, position)

    def _serve_pass(self, pool: ThreadPoolExecutor, begun: Position) -> None:
        """Plan and fetch for one pass of the loader over its steps, until it begins another pass."""
        plan = PrefetchPlan(self._builders, self._rank, self._world_size, self._limit, begun.first)
        warm_step = begun.first + plan.single_sample_steps()
        while True:
            with self._changed:
                position, changes = self._position, self._changes
                room = 2 * PARALLEL_FETCHES - self._in_flight
            assert position is not None
            if (position.first, position.last) != (begun.first, begun.last):
                return
            # 1. Plan one step of one group, or release the units that no later step needs.
            group = plan.next_group(position.step, position.last)
            if group is not None:
                plan.plan_step(group)
            else:
                for unit in plan.release_before(position.step):
                    self._cache.release(unit)
            # 2. Start fetches.
            units = list(islice(iter(plan.next_fetch, None), max(0, room)))
            for unit in units:
                self._submit(pool, unit)
            # 3. Readers fetch single samples while the cache is warming; stop this once the first window is cached.
            if position.step >= warm_step or (group is None and not units and room == 2 * PARALLEL_FETCHES):
                self._cache.set_warming(False)
            # 4. Nothing to do: wait for the loader to advance or for a fetch to end.
            if group is None and not units:
                if room > 0 and plan.is_waiting:
                    self._warn()
                with self._changed:
                    while self._changes == changes:
                        self._changed.wait()

    def _submit(self, pool: ThreadPoolExecutor, unit: ByteRange) -> None:
        with self._changed:
            self._in_flight += 1
        pool.submit(self._fetch, unit)

    def _fetch(self, unit: ByteRange) -> None:
        try:
            with suppress(OSError, UserError):
                if not self._cache.has(unit):
                    fetch(self._cache, unit)
        finally:
            with self._changed:
                self._in_flight -= 1
                self._changes += 1
                self._changed.notify_all()

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the next window of samples is larger than the {self._limit} bytes of the cache that this rank may "
                "fill ahead, so some of it may be fetched twice; raise loader.cache.gigabytes (in Python: gigabytes "
                "of CacheSettings.of)",
                stacklevel=2,
            )


class Prefetcher:
    """Handle of the prefetcher process in the loader: starts it, sends positions, restarts it a few times, stops it."""

    def __init__(self, setups: Sequence[BuilderSetup], rank: int, world_size: int) -> None:
        self._arguments = ([setup.without_content() for setup in setups], rank, world_size)
        self._caches = [Cache(setup.cache) for setup in setups if setup.cache is not None]
        self._starts = 0
        self._position: Position | None = None
        for cache in self._caches:
            cache.sweep()
            cache.set_warming(True)
        self._start()

    @staticmethod
    def start_if_useful(setups: Sequence[BuilderSetup], rank: int, world_size: int) -> Prefetcher | None:
        """Start a prefetcher if one of the streams has a remote source with an index and a cache; else None."""
        useful = [
            setup
            for setup in setups
            if setup.cache is not None
            and can_prefetch(setup.manifests.values())
            and not Cache(setup.cache).off
        ]
        return Prefetcher(useful, rank, world_size) if useful else None

    @property
    def pid(self) -> int:
        return self._process.pid

    def begin(self, first: int, last: int) -> None:
        """Announce that the loader will serve steps first, ..., last - 1."""
        self._send(Position(first, last, first))

    def advance(self, step: int) -> None:
        """Announce that the loader serves `step`, and restart a dead prefetcher.

        After MAX_STARTS starts, continue without prefetching.
        """
        assert self._position is not None
        if self._process.poll() is not None:
            if self._starts == MAX_STARTS:
                self._end_warming()
                return
            self._channel.close()
            self._start()
        self._send(Position(self._position.first, self._position.last, step))

    def close(self) -> None:
        self._channel.close()
        self._process.kill()
        self._process.wait()
        self._end_warming()

    def _end_warming(self) -> None:
        for cache in self._caches:
            cache.set_warming(False)

    def _send(self, position: Position) -> None:
        self._position = position
        with suppress(OSError):
            send(self._channel, position)

    def _start(self) -> None:
        self._starts += 1
        self._channel, child_channel = socket.socketpair()
        with child_channel:
            self._process = start_module("data_pipeline.loader.prefetcher", [child_channel.fileno()])
        with suppress(OSError):
            send(self._channel, self._arguments)


def main(descriptor: int, parent: int) -> None:
    die_with(parent)
    channel = socket.socket(fileno=descriptor)
    try:
        arguments = receive(channel)[0]
        try:
            downloader = _Downloader(*arguments)
        except (OSError, UserError) as error:
            print(
                f"the prefetcher cannot start, so no samples are fetched ahead: {error}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)
        threading.Thread(target=_run, args=(downloader,), daemon=True).start()
        while True:
            downloader.set_position(receive(channel)[0])
    except (EOFError, ConnectionError):
        os._exit(0)


def _run(downloader: _Downloader) -> None:
    """Run, and end the process after an error, so that the loader stops reading single samples."""
    try:
        downloader.run()
    finally:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
