"""Messages between a process and the workers that it starts: pickles, arrays beside them, and open files.

The one place of the data pipeline that reads pickles: from sockets and files without a name that these processes made
for each other; nothing from data ever comes this way.
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

# Files that one message may carry.
DESCRIPTORS = 4
_CLOSED_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


def send(channel: socket.socket, message: Any, descriptors: Sequence[int] = ()) -> None:
    """Pickle a message to our own process at the other end; arrays go beside it, uncopied."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(head), *(buffer.raw() for buffer in buffers)]
    sizes = struct.pack(f"<{len(parts) + 1}Q", len(parts), *(part.nbytes for part in parts))
    sent = socket.send_fds(channel, [sizes], descriptors) if descriptors else 0
    channel.sendall(sizes[sent:])
    for part in parts:
        channel.sendall(part)


def receive(channel: socket.socket) -> tuple[Any, list[int]]:
    """The next message and the files that came with it. Raises EOFError if the other end is gone."""
    begun, descriptors, *_ = socket.recv_fds(channel, 8, DESCRIPTORS, _CLOSED_ON_EXEC)
    if not begun:
        raise EOFError("the other end closed the channel")
    (count,) = struct.unpack("<Q", begun + bytes(_exactly(channel, 8 - len(begun))))
    sizes = struct.unpack(f"<{count}Q", _exactly(channel, 8 * count))
    head, *buffers = [_exactly(channel, size) for size in sizes]
    return pickle.loads(head, buffers=buffers), descriptors  # see above: no bytes of data come this way


def _exactly(channel: socket.socket, size: int) -> memoryview:
    # numpy leaves the memory unset; a bytearray would be zeroed first.
    view, done = np.empty(size, np.uint8).data, 0
    while done < size:
        got = channel.recv_into(view[done:])
        if not got:
            raise EOFError("the other end closed the channel")
        done += got
    return view


def shared_message(message: Any) -> int:
    """An open file without a name that holds a message for several processes."""
    content = pickle.dumps(message, protocol=5)
    descriptor = anonymous_file(len(content), "dromos-message")
    with mmap(descriptor, len(content)) as memory:
        memory[:] = content
    return descriptor


def read_shared(descriptor: int) -> Any:
    """The message of a file that `shared_message` made."""
    with mmap(descriptor, 0) as content:
        return pickle.loads(content)  # written by shared_message of the process that started this one


def can_travel(message: Any) -> bool:
    """Whether a message arrives: a library's error class may fail in any way when it is rebuilt."""
    try:
        pickle.loads(pickle.dumps(message))  # our own bytes, made in this line
    except Exception:  # whatever it raises here would be raised where the message arrives
        return False
    return True


def has_anonymous_memory() -> bool:
    """Whether memory can be shared by handing over an open file that has no name, so that no kill leaves it behind."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


def anonymous_file(size: int, name: str = "dromos") -> int:
    """An open file of `size` zero bytes, without a name: in memory where the system can, else on disk."""
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
