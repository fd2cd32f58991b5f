"""Samples that are read one by one, several at once: those of a batch whose window is not in the cache yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

AT_ONCE = 16

Place = tuple[int, int]
"""Shard, and position in its tar."""


class ReadAhead:
    """Reads places in the order in which they will be asked for, never more than AT_ONCE ahead."""

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self._read = read
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: deque[Place] = deque()
        self._begun: dict[Place, Future[bytes]] = {}

    def expect(self, places: Iterable[Place]) -> None:
        """These will be asked for next, in this order; what was expected before will not."""
        self.forget()
        self._waiting.extend(dict.fromkeys(places))

    def take(self, place: Place) -> bytes | None:
        """What was read, or what its reading raised; None for a place that nobody expected."""
        if not self._waiting and place not in self._begun:
            return None
        if self._pool is None:
            self._pool = ThreadPoolExecutor(AT_ONCE, "dromos-read")
        while self._waiting and len(self._begun) < AT_ONCE:
            following = self._waiting.popleft()
            self._begun[following] = self._pool.submit(self._read, *following)
        future = self._begun.pop(place, None)
        return None if future is None else future.result()

    def forget(self) -> None:
        """Expect nothing any more."""
        self._waiting.clear()
        for future in self._begun.values():
            future.cancel()
        self._begun.clear()

    def close(self) -> None:
        """End its threads."""
        self.forget()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
