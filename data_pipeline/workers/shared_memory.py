"""Shared memory for pixels: workers write them, this process reads them as arrays and reuses unreferenced buffers.

A buffer is reused when no array references it. Buffers are anonymous files (memfd), so the kernel frees them even after
a kill. A worker receives a buffer's file with the first work item that uses it and maps it once; this process maps it
once, too.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from mmap import mmap

import numpy as np

from data_pipeline.workers.ipc import anonymous_file, has_anonymous_memory

# A buffer takes two of this process's open files, of which the usual limit allows 1024. Batches beyond the limit travel
# through the socket.
MAX_BUFFERS = 128


class SharedBuffer:
    """One memfd, mapped into this process."""

    def __init__(self, number: int, size: int) -> None:
        self.number, self.size = number, size
        self.descriptor = anonymous_file(size, "dromos-batch")
        try:
            self.memory = mmap(self.descriptor, size)
        except OSError:
            os.close(self.descriptor)
            raise

    def array(self, size: int) -> np.ndarray:
        """The first `size` bytes as uint8 [size], without a copy."""
        return np.frombuffer(self.memory, np.uint8, size)


class SharedBufferPool:
    """The buffers of a worker pool. Its methods run in one thread, except `hand_out`."""

    def __init__(self) -> None:
        self.alive: dict[int, SharedBuffer] = {}
        self._free: deque[SharedBuffer] = deque()
        self._returned: deque[SharedBuffer] = deque()  # finalizers append to it, in any thread at any time
        self._next_number = 0

    def acquire(self, size: int) -> SharedBuffer | None:
        """A buffer of at least `size` bytes that no array uses; None if no more buffers can be created."""
        while self._returned:
            self._free.append(self._returned.popleft())
        fitting = [buffer for buffer in self._free if size <= buffer.size <= 2 * size]
        if fitting:
            buffer = min(fitting, key=lambda each: each.size)
            self._free.remove(buffer)
            return buffer
        if len(self.alive) >= MAX_BUFFERS and self._free:
            self._drop(self._free.popleft())
        if len(self.alive) >= MAX_BUFFERS or not size or not has_anonymous_memory():
            return None
        try:
            buffer = SharedBuffer(self._next_number, size)
        except OSError:  # out of file descriptors or of memory to map
            return None
        self._next_number += 1
        self.alive[buffer.number] = buffer
        return buffer

    def hand_out(self, buffer: SharedBuffer, shape: tuple[int, ...]) -> np.ndarray:
        """The buffer's first bytes as a uint8 array of `shape`. The buffer is free again when the array and all views
        of it are gone.
        """
        whole = buffer.array(int(np.prod(shape)))
        # Views, buffers and torch tensors of the returned array all reference `whole`, the array below them.
        weakref.finalize(whole, self._returned.append, buffer).atexit = False
        return whole.reshape(shape)

    def release(self, buffer: SharedBuffer) -> None:
        """Return a buffer that was acquired but not handed out."""
        self._returned.append(buffer)

    def trim(self, keep: int) -> None:
        """Drop all free buffers but `keep`; the least recently used go first."""
        while self._returned:
            self._free.append(self._returned.popleft())
        while len(self._free) > keep:
            self._drop(self._free.popleft())

    def close(self) -> None:
        """Close the files. Memory that arrays still use stays mapped until they are gone."""
        for buffer in list(self.alive.values()):
            self._drop(buffer)
        self._free.clear()

    def _drop(self, buffer: SharedBuffer) -> None:
        del self.alive[buffer.number]
        os.close(buffer.descriptor)
