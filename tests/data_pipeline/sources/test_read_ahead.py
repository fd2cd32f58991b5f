"""ReadAhead: each sample is read once, in parallel, at most PARALLEL_READS ahead; errors belong to their sample."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from data_pipeline.errors import ReadError
from data_pipeline.sources.remote_shards import PARALLEL_READS, Location, ReadAhead


class Store:
    """Records the reads and the largest number of parallel ones."""

    def __init__(self) -> None:
        self.reads: list[Location] = []
        self.running = self.most_running = 0
        self.lock = threading.Lock()

    def read(self, shard: int, index: int) -> bytes:
        with self.lock:
            self.reads.append((shard, index))
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        time.sleep(0.005)
        with self.lock:
            self.running -= 1
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


def test_each_sample_is_read_once_and_in_parallel() -> None:
    store = Store()
    places = [(n % 3, n) for n in range(20, 120)]
    with ahead_of(store) as ahead:
        ahead.expect([*places, places[0]])
        assert not store.reads  # reading starts with the first take
        assert [ahead.take(place) for place in places] == [f"{a} {b}".encode() for a, b in places]
    assert sorted(store.reads) == sorted(places)
    assert 4 <= store.most_running <= PARALLEL_READS


def test_the_number_of_reads_ahead_is_bounded() -> None:
    store = Store()
    with ahead_of(store) as ahead:
        ahead.expect([(0, n) for n in range(20, 120)])
        assert ahead.take((0, 20)) == b"0 20"
        time.sleep(0.05)
        assert len(store.reads) == PARALLEL_READS


def test_an_error_is_raised_for_its_own_sample() -> None:
    store = Store()
    with ahead_of(store) as ahead:
        ahead.expect([(0, 12), (0, 13), (0, 14)])
        assert ahead.take((0, 12)) == b"0 12"
        with pytest.raises(ReadError, match="sample 13"):
            ahead.take((0, 13))
        assert ahead.take((0, 13)) is None  # not read again: the caller retries
        assert ahead.take((0, 14)) == b"0 14"


def test_samples_that_are_not_announced_are_left_to_the_caller() -> None:
    store = Store()
    with ahead_of(store) as ahead:
        assert ahead.take((0, 1)) is None
        ahead.expect([(0, 20), (0, 21)])
        ahead.expect([(0, 30)])
        assert ahead.take((0, 20)) is None
        assert ahead.take((0, 30)) == b"0 30"
        ahead.expect([(0, 40)])
        ahead.cancel()
        assert ahead.take((0, 40)) is None
    assert store.reads == [(0, 30)]
