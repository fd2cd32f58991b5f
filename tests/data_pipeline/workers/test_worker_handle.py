"""The parent's side of workers: every one is told of every bad sample and of every buffer it has that is gone, once."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline.activity import Activity
from data_pipeline.batches.work_items import WorkItem
from data_pipeline.workers import worker_handle
from data_pipeline.workers.ipc import receive
from data_pipeline.workers.shared_memory import SharedBuffer
from data_pipeline.workers.worker import KnownBad, WorkMessage
from data_pipeline.workers.worker_handle import SetupFile, WorkerProcess

A, B, C = ("web", 0, 3), ("web", 2, 1), ("other", 0, 0)


@pytest.fixture
def channels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[socket.socket]]:
    """The workers' ends of the channels, in the order of their start; no process is started."""
    opened: list[socket.socket] = []

    def start(module: str, descriptors: Sequence[int], variables: Any, folders: Sequence[str]) -> Any:
        opened.append(socket.socket(fileno=os.dup(descriptors[0])))
        return SimpleNamespace(pid=0, kill=lambda: None, wait=lambda: 0)

    monkeypatch.setattr(worker_handle, "start_module", start)
    yield opened
    for channel in opened:
        channel.close()


@pytest.fixture
def workers(channels: list[socket.socket]) -> Iterator[list[WorkerProcess]]:
    setups = SetupFile([])
    started = [WorkerProcess(setups) for _ in range(3)]
    yield started
    for worker in started:
        worker.kill()
    setups.close()


def sent(channel: socket.socket) -> tuple[WorkMessage, int]:
    """The next message that a worker gets, and the number of files with it."""
    message, descriptors = receive(channel)
    for descriptor in descriptors:
        os.close(descriptor)
    return message, len(descriptors)


def work(known_bad: KnownBad | None = None, **buffer: int) -> WorkMessage:
    return WorkMessage(0, WorkItem("pairs", 0, 0, 4), known_bad=known_bad or {}, **buffer)


def test_every_worker_is_told_of_every_bad_sample(
    workers: list[WorkerProcess], channels: list[socket.socket]
) -> None:
    """Workers get work at different times; each knows all that was found by then, though none is told twice."""
    first: KnownBad = {"pairs": {A: "crash"}}
    second: KnownBad = {"pairs": {A: "crash", B: "crash"}}
    third: KnownBad = {"pairs": {A: "crash", B: "crash"}, "text": {C: "crash"}}
    given: list[list[KnownBad]] = [
        [{}, first, first, second, third],
        [{}, second, third, third],
        [third],
    ]
    for worker, channel, messages in zip(workers, channels, given, strict=True):
        known: dict[str, dict[Any, str]] = {}
        repeated = 0
        for known_bad in messages:
            worker.send(work(known_bad))
            told = sent(channel)[0].known_bad
            repeated += bool(told) and told == known
            for stream, samples in told.items():
                known.setdefault(stream, {}).update(samples)
            assert known == known_bad
        assert not repeated


def test_a_buffer_is_sent_to_every_worker_once_and_every_one_forgets_it(
    workers: list[WorkerProcess], channels: list[socket.socket]
) -> None:
    buffers = [SharedBuffer(number, 4096) for number in (0, 1)]
    alive = {0, 1}
    for worker, channel in zip(workers[:2], channels[:2], strict=True):  # the third gets none
        for buffer, files in ((buffers[0], 1), (buffers[0], 0), (buffers[1], 1)):
            worker.send(work(buffer=buffer.number, size=4096), buffer, alive)
            message, count = sent(channel)
            assert (message.buffer, count, message.forget) == (buffer.number, files, ())
    os.close(buffers[0].descriptor)
    for number, (worker, channel) in enumerate(zip(workers, channels, strict=True)):
        for forgotten in ((0,) if number < 2 else (), ()):
            worker.send(work(), None, {1})
            assert sent(channel)[0].forget == forgotten
        worker.send(work(buffer=1, size=4096), buffers[1], {1})
        assert sent(channel)[1] == (0 if number < 2 else 1)
    os.close(buffers[1].descriptor)


def test_a_worker_on_a_system_without_anonymous_memory_shows_no_activity(
    channels: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_handle, "has_anonymous_memory", lambda: False)
    setups = SetupFile([])
    worker = WorkerProcess(setups)
    assert worker.inspect() == Activity()
    worker.kill()
    setups.close()


def test_the_ends_for_a_worker_that_cannot_start_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: whoever keeps the error keeps the objects of its frames, too."""
    given: list[int] = []

    def start(module: str, descriptors: Sequence[int], variables: Any, folders: Sequence[str]) -> Any:
        given.extend(descriptors)
        raise OSError("no more processes")

    monkeypatch.setattr(worker_handle, "start_module", start)
    setups = SetupFile([])
    with pytest.raises(OSError, match="no more processes") as kept:
        WorkerProcess(setups)
    channel, _, status = given
    for closed in (channel, status):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(closed)
    setups.close()
    assert kept.traceback
