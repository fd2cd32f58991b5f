"""Messages between a process and the workers that it started: pickles, arrays out of band, file descriptors.

Wire format of a message: the number of parts and the byte size of each part as little-endian uint64, then the parts:
the pickle (protocol 5) and its out-of-band buffers. File descriptors travel with the first bytes (SCM_RIGHTS).

This is the only module of the data pipeline that reads pickles. They come only from our own processes, through sockets
and anonymous files, never from user data.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
import sys
import tempfile
from collections.abc import Sequence
from mmap import mmap
from typing import Any

import numpy as np

MAX_DESCRIPTORS = 4  # open files that one message may carry


def send(channel: socket.socket, message: Any, descriptors: Sequence[int] = ()) -> None:
    """Send a message and open files to the process at the other end. Arrays are sent out of band, without a copy."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(head), *(buffer.raw() for buffer in buffers)]
    sizes = struct.pack(f"<{len(parts) + 1}Q", len(parts), *(part.nbytes for part in parts))
    sent = socket.send_fds(channel, [sizes], descriptors) if descriptors else 0
    channel.sendall(sizes[sent:])
    for part in parts:
        channel.sendall(part)


def receive(channel: socket.socket) -> tuple[Any, list[int]]:
    """Wait for the next message; returns it with its file descriptors. Raises EOFError if the other end is closed."""
    prefix, descriptors, *_ = socket.recv_fds(channel, 8, MAX_DESCRIPTORS)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)  # recv_fds ignores MSG_CMSG_CLOEXEC
    if not prefix:
        raise EOFError("the other end closed the channel")
    (count,) = struct.unpack("<Q", prefix + bytes(_receive_exactly(channel, 8 - len(prefix))))
    sizes = struct.unpack(f"<{count}Q", _receive_exactly(channel, 8 * count))
    head, *buffers = [_receive_exactly(channel, size) for size in sizes]
    return pickle.loads(head, buffers=buffers), descriptors  # only from our own processes, see above


def _receive_exactly(channel: socket.socket, size: int) -> memoryview:
    # numpy does not clear the memory; a bytearray would write zeros to it first.
    view, done = np.empty(size, np.uint8).data, 0
    while done < size:
        received = channel.recv_into(view[done:])
        if not received:
            raise EOFError("the other end closed the channel")
        done += received
    return view


def write_shared(message: Any) -> int:
    """Write a message for several processes to an anonymous file; returns its file descriptor."""
    content = pickle.dumps(message, protocol=5)
    descriptor = anonymous_file(len(content), "dromos-message")
    with mmap(descriptor, len(content)) as memory:
        memory[:] = content
    return descriptor


def read_shared(descriptor: int) -> Any:
    """Read the message of a file that `write_shared` wrote."""
    with mmap(descriptor, 0) as content:
        return pickle.loads(content)  # written by the process that started this one


def survives_pickling(message: Any) -> bool:
    """True if the receiver can unpickle the message; the error classes of some libraries cannot be unpickled."""
    try:
        pickle.loads(pickle.dumps(message))  # bytes made in this line
    except Exception:  # the receiver would raise the same
        return False
    return True


def has_anonymous_memory() -> bool:
    """True if the system has memfd: shared memory without a name, which the kernel frees even after a kill."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


def anonymous_file(size: int, name: str = "dromos") -> int:
    """Create a nameless file of `size` zero bytes, a memfd where there is one, else on disk; returns its descriptor."""
    if has_anonymous_memory():
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        os.ftruncate(descriptor, size)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
