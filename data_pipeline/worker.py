"""A worker process of the loader: makes the batches it is asked for, over a socket, until its parent is gone.

Started as `python -m data_pipeline.worker FD PARENT`. Not by multiprocessing, whose spawn imports the parent's
main module, and with it torch, in every worker.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import socket
import struct
import sys
import traceback
from typing import Any

import numpy as np

from data_pipeline.batches import BatchMaker
from data_pipeline.work import Setup

PR_SET_PDEATHSIG = 1


def send(channel: socket.socket, message: Any) -> None:
    """Pickle a message to our own process at the other end; arrays go beside it, uncopied."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(head), *(buffer.raw() for buffer in buffers)]
    channel.sendall(struct.pack(f"<{len(parts) + 1}Q", len(parts), *(part.nbytes for part in parts)))
    for part in parts:
        channel.sendall(part)


def receive(channel: socket.socket) -> Any:
    """The next message. Raises EOFError if the other end is gone."""
    (count,) = struct.unpack("<Q", _exactly(channel, 8))
    sizes = struct.unpack(f"<{count}Q", _exactly(channel, 8 * count))
    head, *buffers = [_exactly(channel, size) for size in sizes]
    # Pickle of our own process over a socket that it made for us; nothing from data ever comes this way.
    return pickle.loads(head, buffers=buffers)


def _exactly(channel: socket.socket, size: int) -> memoryview:
    # numpy leaves the memory unset; a bytearray would be zeroed first.
    view, done = np.empty(size, np.uint8).data, 0
    while done < size:
        got = channel.recv_into(view[done:])
        if not got:
            raise EOFError("the other end closed the channel")
        done += got
    return view


def portable(error: Exception) -> Exception:
    """The error if it survives pickling, else a RuntimeError with its type and text; with the trace as a note."""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a library's error class may fail in any way when it is rebuilt
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.__traceback__ = error.__cause__ = error.__context__ = None
    error.add_note(f"in a worker of the loader:\n{trace}")
    return error


def die_with(parent: int) -> None:
    """Ask the kernel for SIGKILL when the parent dies, and go at once if it is dead already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def serve(channel: socket.socket) -> None:
    """Answer items with (number, batch or error) until the channel closes. The first message is the setups."""
    setups: dict[str, Setup] = {setup.spec.name: setup for setup in receive(channel)}
    makers: dict[str, BatchMaker] = {}
    while True:
        number, item = receive(channel)
        answer: Any
        try:
            if item.stream not in makers:
                makers[item.stream] = setups[item.stream].maker()
            answer = makers[item.stream].make(item.step, item.start, item.stop)
        except Exception as error:
            answer = portable(error)
        send(channel, (number, answer))


def main(descriptor: int, parent: int) -> None:
    # Ctrl-C and Slurm's warning go to every process of the job; it is the trainer that ends this one.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    die_with(parent)
    try:
        serve(socket.socket(fileno=descriptor))
    except (EOFError, ConnectionError):
        os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
