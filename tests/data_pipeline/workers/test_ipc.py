"""Messages between processes: whole in any pieces, arrays as they were, open files with their message."""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

import numpy as np
import pytest

from data_pipeline.workers import ipc

MESSAGE: dict[str, Any] = {
    "text": "ü" * 300,
    "pixels": np.arange(2 * 5 * 5 * 3, dtype=np.uint8).reshape(2, 5, 5, 3),
    "fortran": np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)),
    "strided": np.arange(40, dtype=np.int64)[::3],
    "empty": np.zeros((3, 0), np.int32),
    "numbers": [1, 2**70, -1.5, None],
}


def assert_same(found: dict[str, Any]) -> None:
    assert found.keys() == MESSAGE.keys()
    for name, value in MESSAGE.items():
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name], value)
        else:
            assert found[name] == value


def wire() -> bytes:
    """The bytes of MESSAGE."""
    one, other = socket.socketpair()
    with one, other:
        ipc.send(one, MESSAGE)
        one.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: other.recv(65536), b""))


@pytest.mark.parametrize("piece", [1, 3, 7, 8, 9, 500, 100_000])
def test_messages_arrive_whole_in_any_pieces(piece: int) -> None:
    raw = wire() * 2
    one, other = socket.socketpair()

    def feed() -> None:
        for at in range(0, len(raw), piece):
            one.sendall(raw[at : at + piece])
        one.close()

    thread = threading.Thread(target=feed)
    with other:
        thread.start()
        for _ in range(2):
            found, descriptors = ipc.receive(other)
            assert_same(found)
            assert found["pixels"].flags.writeable
            assert descriptors == []
        with pytest.raises(EOFError):
            ipc.receive(other)
        thread.join()


def test_a_message_that_is_cut_anywhere_is_the_end_of_the_channel() -> None:
    """A worker that is killed while it answers; a part of a batch must never be taken for one."""
    raw = wire()
    for length in {0, 1, 7, 8, 9, 40, len(raw) // 2, len(raw) - 1}:
        one, other = socket.socketpair()
        with other:
            one.sendall(raw[:length])
            one.close()
            with pytest.raises(EOFError):
                ipc.receive(other)


def test_open_files_come_with_their_own_message() -> None:
    one, other = socket.socketpair()
    files = [ipc.anonymous_file(size) for size in (100, 200)]
    with one, other:
        ipc.send(one, "first", files[:1])
        ipc.send(one, "none")
        ipc.send(one, "both", files)
        found = [ipc.receive(other) for _ in range(3)]
    assert [(text, len(descriptors)) for text, descriptors in found] == [
        ("first", 1),
        ("none", 0),
        ("both", 2),
    ]
    received = [descriptor for _, descriptors in found for descriptor in descriptors]
    assert [os.fstat(descriptor).st_size for descriptor in received] == [100, 100, 200]
    assert os.path.samestat(os.fstat(received[0]), os.fstat(files[0]))
    assert not any(os.get_inheritable(descriptor) for descriptor in received)
    for descriptor in (*files, *received):
        os.close(descriptor)


def test_a_message_for_several_processes_is_read_by_each() -> None:
    descriptor = ipc.write_shared(MESSAGE)
    try:
        for _ in range(2):
            assert_same(ipc.read_shared(descriptor))
    finally:
        os.close(descriptor)


def test_what_cannot_be_pickled_is_known_before_it_is_sent() -> None:
    class Local(Exception):
        def __init__(self, first: str, second: str) -> None:
            super().__init__(first)

    assert ipc.survives_pickling(ValueError("x"))
    assert not ipc.survives_pickling(lambda: None)
    assert not ipc.survives_pickling(Local("a", "b"))
