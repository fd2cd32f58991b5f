"""Worker process of the loader, child side: builds the batches requested over a socket until its parent ends.

Started as `python -m data_pipeline.workers.worker CHANNEL SETUPS STATUS PARENT`: three file descriptors (STATUS may be
-1) and the parent's process id. multiprocessing is not used, because its spawn imports the parent's main module, and
with it torch, in every worker.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from mmap import mmap
from typing import Any

import numpy as np

from data_pipeline import activity
from data_pipeline.activity import Sample
from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.work_items import BuilderSetup, WorkItem, pixel_shape
from data_pipeline.child_process import die_with
from data_pipeline.workers.ipc import read_shared, receive, send, survives_pickling

# Stream -> sample -> reason: samples that are replaced without being decoded.
KnownBad = Mapping[str, Mapping[Sample, str]]
# The number of the message that a worker sends when it has started.
READY = -1


@dataclass(frozen=True)
class WorkMessage:
    """A work item to build.

    buffer: number of the shared buffer for its pixels, from byte `offset` on; None: the batch carries its pixels
    size: bytes of the buffer; its file descriptor comes with the first message that uses it
    forget: numbers of buffers that no longer exist
    """

    number: int
    item: WorkItem
    buffer: int | None = None
    offset: int = 0
    size: int = 0
    forget: tuple[int, ...] = ()
    known_bad: KnownBad = field(default_factory=dict)


def picklable_error(error: Exception) -> Exception:
    """The error if it survives pickling, else a RuntimeError with its type and text. Its traceback becomes a note."""
    trace = "".join(traceback.format_exception(error))
    if not survives_pickling(error):
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.__traceback__ = error.__cause__ = error.__context__ = None
    error.add_note(f"in a loader worker:\n{trace}")
    return error


class Builders:
    """Stream name -> BatchBuilder. Each builder is made at its first use and knows the bad samples of its stream."""

    def __init__(self, setups: list[BuilderSetup]) -> None:
        self._setups = {setup.spec.name: setup for setup in setups}
        self._builders: dict[str, BatchBuilder] = {}
        self._known_bad: dict[str, dict[Sample, str]] = {}

    def __getitem__(self, stream: str) -> BatchBuilder:
        if stream not in self._builders:
            self._builders[stream] = self._setups[stream].builder()
            self.add_known_bad({})
        return self._builders[stream]

    def add_known_bad(self, known_bad: KnownBad) -> None:
        for stream, samples in known_bad.items():
            self._known_bad.setdefault(stream, {}).update(samples)
        for stream, builder in self._builders.items():
            builder.known_bad.update(self._known_bad.get(stream, {}))

    def make_all(self) -> None:
        """Make all builders before the first item arrives.

        Errors are ignored here; the same error is raised at the first use of the builder.
        """
        for stream in self._setups:
            with suppress(Exception):
                self[stream]


def serve(channel: socket.socket, builders: Builders) -> None:
    """Answer each WorkMessage with (number, batch or error). Raises EOFError when the channel closes."""
    buffers: dict[int, mmap] = {}
    send(channel, (READY, None))
    while True:
        work, descriptors = receive(channel)
        for number in work.forget:
            buffers.pop(number, None)
        for descriptor in descriptors:
            buffers[work.buffer] = mmap(descriptor, work.size)
            os.close(descriptor)
        result: Any
        try:
            builders.add_known_bad(work.known_bad)
            builder, item = builders[work.item.stream], work.item
            pixels = None
            if work.buffer is not None:
                pixels = _pixels(buffers[work.buffer], work.offset, item.stop - item.start, builder)
            result = builder.make(item.step, item.start, item.stop, pixels)
            if pixels is not None:
                del result.fields["pixels"]
        except Exception as error:
            result = picklable_error(error)
        send(channel, (work.number, result))


def _pixels(buffer: mmap, offset: int, rows: int, builder: BatchBuilder) -> np.ndarray:
    shape = pixel_shape(builder.spec, rows)
    return np.frombuffer(buffer, np.uint8, int(np.prod(shape)), offset).reshape(shape)


def main(channel: int, setups: int, status: int, parent: int) -> None:
    die_with(parent)
    if status >= 0:
        activity.write_status_to(mmap(status, activity.STATUS_BYTES))
    try:
        builders = Builders(read_shared(setups))
        builders.make_all()
        serve(socket.socket(fileno=channel), builders)
    except (EOFError, ConnectionError):
        os._exit(0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]))
