"""Status memory of a process: reads and decodes of several threads, and of a process that was killed."""

from __future__ import annotations

import mmap
import os
import random
import signal
import threading

import pytest

from data_pipeline import activity
from data_pipeline.activity import Activity, read_status

IDLE = Activity()


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> bytearray:
    given = bytearray(activity.STATUS_BYTES)
    monkeypatch.setattr(activity, "_status", None)
    activity.write_status_to(given)
    return given


def test_nothing_is_kept_where_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activity, "_status", None)
    with activity.reading("a"), activity.decoding("s", 0, 1):
        assert activity._status is None
    assert read_status(bytearray(activity.STATUS_BYTES)) == IDLE


def test_reads_and_decodes_are_shown_while_they_last(memory: bytearray) -> None:
    with activity.reading("s3://bucket/ä.tar"):
        first = read_status(memory)
        assert (first.url, first.sample) == ("s3://bucket/ä.tar", None)
        with activity.decoding("web", 3, 70000):
            both = read_status(memory)
            assert (both.url, both.reading_since) == (first.url, first.reading_since)
            assert both.sample == ("web", 3, 70000)
            assert both.decoding_since >= first.reading_since > 0
    assert read_status(memory) == IDLE
    activity.decoding("web", 1, 2)  # without `with`: until the next
    assert read_status(memory).sample == ("web", 1, 2)
    with pytest.raises(OSError, match="reset"), activity.reading("b"):
        raise OSError("reset")
    assert read_status(memory).url is None


def test_the_oldest_of_several_reads_is_shown(memory: bytearray) -> None:
    begun, done = threading.Event(), threading.Event()

    def read() -> None:
        with activity.reading("slow"):
            begun.set()
            done.wait(10)

    thread = threading.Thread(target=read)
    thread.start()
    begun.wait(10)
    with activity.reading("fast"):
        assert read_status(memory).url == "slow"
        done.set()
        thread.join()
        assert read_status(memory).url == "fast"
    assert read_status(memory) == IDLE


def test_texts_longer_than_their_place_are_cut(memory: bytearray) -> None:
    with activity.reading("u" * 10000), activity.decoding("s" * 10000, 1, 2):
        found = read_status(memory)
    assert found.url is not None
    assert set(found.url) == {"u"}
    assert found.sample is not None
    assert set(found.sample[0]) == {"s"}
    assert len(memory) == activity.STATUS_BYTES


def test_what_another_process_did_when_it_died_is_never_half_written() -> None:
    """The process is killed at random moments; source, shard and index always belong together."""
    generator = random.Random(4)
    for _ in range(20):
        memory = mmap.mmap(-1, activity.STATUS_BYTES)
        pid = os.fork()
        if pid == 0:
            activity.write_status_to(memory)
            for number in range(1 << 30):
                activity.decoding(f"{number}" * (number % 7 + 1), number, number)
        seen = set()
        while len(seen) < 3:
            seen.add(read_status(memory).sample)
        for _ in range(generator.randrange(200)):
            seen.add(read_status(memory).sample)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        seen.add(read_status(memory).sample)
        for sample in seen - {None}:
            assert sample == (f"{sample[1]}" * (sample[1] % 7 + 1), sample[1], sample[1])
