"""A worker process of the loader: makes the batches it is asked for, over a socket, until its parent is gone.

Started as `python -m data_pipeline.workers.worker CHANNEL SETUPS STATUS PARENT`: three open files, and a process.
Not by
multiprocessing, whose spawn imports the parent's main module, and with it torch, in every worker.
"""

from __future__ import annotations

import os
import signal
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
from data_pipeline.workers.ipc import can_travel, read_shared, receive, send

Condemned = Mapping[str, Mapping[Sample, str]]
"""Stream -> sample -> reason: what is replaced without being decoded."""
READY = -1
"""The number of the message that a worker sends when it has started."""


@dataclass(frozen=True)
class WorkMessage:
    """An item to make. Its pixels go to `slab`, from byte `offset` on; without one they come back in the batch.

    A slab's file comes with the message in which it is new. `forget`: slabs that are no more.
    """

    number: int
    item: WorkItem
    slab: int | None = None
    offset: int = 0
    size: int = 0
    forget: tuple[int, ...] = ()
    condemned: Condemned = field(default_factory=dict)


def portable(error: Exception) -> Exception:
    """The error if it survives pickling, else a RuntimeError with its type and text; with the trace as a note."""
    trace = "".join(traceback.format_exception(error))
    if not can_travel(error):
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.__traceback__ = error.__cause__ = error.__context__ = None
    error.add_note(f"in a worker of the loader:\n{trace}")
    return error


class Makers:
    """The builders of a process's streams, each made when it is first used, and what they are not to decode."""

    def __init__(self, setups: list[BuilderSetup]) -> None:
        self._setups = {setup.spec.name: setup for setup in setups}
        self._made: dict[str, BatchBuilder] = {}
        self._condemned: dict[str, dict[Sample, str]] = {}

    def __getitem__(self, stream: str) -> BatchBuilder:
        if stream not in self._made:
            self._made[stream] = self._setups[stream].builder()
            self.condemn({})
        return self._made[stream]

    def condemn(self, found: Condemned) -> None:
        for stream, samples in found.items():
            self._condemned.setdefault(stream, {}).update(samples)
        for stream, builder in self._made.items():
            builder.condemned.update(self._condemned.get(stream, {}))

    def prepare(self) -> None:
        """Make all before they are asked for; what is wrong with one is said when it is."""
        for stream in self._setups:
            with suppress(Exception):
                self[stream]


def serve(channel: socket.socket, builders: Makers) -> None:
    """Answer each Work with (number, batch or error) until the channel closes."""
    slabs: dict[int, mmap] = {}
    send(channel, (READY, None))
    while True:
        work, descriptors = receive(channel)
        for number in work.forget:
            slabs.pop(number, None)
        for descriptor in descriptors:
            slabs[work.slab] = mmap(descriptor, work.size)
            os.close(descriptor)
        answer: Any
        try:
            builders.condemn(work.condemned)
            builder, item = builders[work.item.stream], work.item
            pixels = None
            if work.slab is not None:
                pixels = _pixels(slabs[work.slab], work.offset, item.stop - item.start, builder)
            answer = builder.make(item.step, item.start, item.stop, pixels)
            if pixels is not None:
                answer.pixels = None
        except Exception as error:
            answer = portable(error)
        send(channel, (work.number, answer))


def _pixels(slab: mmap, offset: int, rows: int, builder: BatchBuilder) -> np.ndarray:
    shape = pixel_shape(builder.spec, rows)
    return np.frombuffer(slab, np.uint8, int(np.prod(shape)), offset).reshape(shape)


def main(channel: int, setups: int, status: int, parent: int) -> None:
    # Ctrl-C and Slurm's warning go to every process of the job; it is the trainer that ends this one.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    die_with(parent)
    if status >= 0:
        activity.install(mmap(status, activity.SIZE))
    try:
        builders = Makers(read_shared(setups))
        builders.prepare()
        serve(socket.socket(fileno=channel), builders)
    except (EOFError, ConnectionError):
        os._exit(0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]))
