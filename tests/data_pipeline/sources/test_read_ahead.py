"""Samples read one by one, several at once: each once, in any order of asking, errors where they belong."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from data_pipeline.errors import ReadError
from data_pipeline.sources.remote_shards import PARALLEL_READS, Place, ReadAhead


class Store:
    """Counts what is read, and how much of it at once."""

    def __init__(self) -> None:
        self.asked: list[Place] = []
        self.now = self.most = 0
        self.lock = threading.Lock()

    def read(self, shard: int, index: int) -> bytes:
        with self.lock:
            self.asked.append((shard, index))
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.005)
        with self.lock:
            self.now -= 1
        if index == 13:
            raise ReadError(f"sample {index}")
        return f"{shard} {index}".encode()


@contextmanager
def ahead_of(store: Store) -> Iterator[ReadAhead]:
    ahead = ReadAhead(store.read)
    try:
        yield ahead
    finally:
        ahead.close()


def test_each_is_read_once_and_several_at_once() -> None:
    store = Store()
    places = [(n % 3, n) for n in range(20, 120)]
    with ahead_of(store) as ahead:
        ahead.expect([*places, places[0]])
        assert not store.asked  # nothing before somebody asks
        assert [ahead.take(place) for place in places] == [f"{a} {b}".encode() for a, b in places]
    assert sorted(store.asked) == sorted(places)
    assert 4 <= store.most <= PARALLEL_READS


def test_it_never_runs_far_ahead() -> None:
    store = Store()
    with ahead_of(store) as ahead:
        ahead.expect([(0, n) for n in range(20, 120)])
        assert ahead.take((0, 20)) == b"0 20"
        time.sleep(0.05)
        assert len(store.asked) == PARALLEL_READS


def test_an_error_is_raised_for_its_own_sample() -> None:
    store = Store()
    with ahead_of(store) as ahead:
        ahead.expect([(0, 12), (0, 13), (0, 14)])
        assert ahead.take((0, 12)) == b"0 12"
        with pytest.raises(ReadError, match="sample 13"):
            ahead.take((0, 13))
        assert ahead.take((0, 13)) is None  # the next try is the caller's own
        assert ahead.take((0, 14)) == b"0 14"


def test_what_nobody_expects_is_left_to_the_caller() -> None:
    store = Store()
    with ahead_of(store) as ahead:
        assert ahead.take((0, 1)) is None
        ahead.expect([(0, 20), (0, 21)])
        ahead.expect([(0, 30)])
        assert ahead.take((0, 20)) is None
        assert ahead.take((0, 30)) == b"0 30"
        ahead.expect([(0, 40)])
        ahead.forget()
        assert ahead.take((0, 40)) is None
    assert store.asked == [(0, 30)]
