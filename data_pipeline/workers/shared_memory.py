"""Memory for pixels that workers fill and this process hands out: used again when its last reader is gone.

Open files without a name (memfd), so that nothing stays behind whatever is killed. A worker gets the file with the
first item that uses it and maps it once; so does this process.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from mmap import mmap

import numpy as np

from data_pipeline.workers.ipc import anonymous_file, has_anonymous_memory

# Each costs this process two open files, of which it may have 1024; further batches come through the socket.
LIMIT = 128


class SharedBuffer:
    """One piece of shared memory, mapped here."""

    def __init__(self, number: int, size: int) -> None:
        self.number, self.size = number, size
        self.descriptor = anonymous_file(size, "dromos-batch")
        try:
            self.memory = mmap(self.descriptor, size)
        except OSError:
            os.close(self.descriptor)
            raise

    def array(self, size: int) -> np.ndarray:
        """uint8 [size] on this memory."""
        return np.frombuffer(self.memory, np.uint8, size)


class SharedBufferPool:
    """The slabs of a pool. Used by one thread, but for `hand_out`."""

    def __init__(self) -> None:
        self.alive: dict[int, SharedBuffer] = {}
        self._free: deque[SharedBuffer] = deque()
        self._returned: deque[SharedBuffer] = deque()  # filled by finalizers, in any thread and at any moment
        self._next = 0

    def take(self, size: int) -> SharedBuffer | None:
        """A slab of at least so many bytes that nobody sees; None where there can be no more."""
        while self._returned:
            self._free.append(self._returned.popleft())
        fitting = [slab for slab in self._free if size <= slab.size <= 2 * size]
        if fitting:
            slab = min(fitting, key=lambda each: each.size)
            self._free.remove(slab)
            return slab
        if len(self.alive) >= LIMIT and self._free:
            self._drop(self._free.popleft())
        if len(self.alive) >= LIMIT or not size or not has_anonymous_memory():
            return None
        try:
            slab = SharedBuffer(self._next, size)
        except OSError:  # no more open files, or no more memory to map
            return None
        self._next += 1
        self.alive[slab.number] = slab
        return slab

    def hand_out(self, slab: SharedBuffer, shape: tuple[int, ...]) -> np.ndarray:
        """Its first bytes as uint8 of a shape. The slab comes back when this array and all views of it are gone."""
        whole = slab.array(int(np.prod(shape)))
        # numpy's views, buffers and torch tensors of this array all hold `whole`, since it does not own its memory.
        weakref.finalize(whole, self._returned.append, slab).atexit = False
        return whole.reshape(shape)

    def give_back(self, slab: SharedBuffer) -> None:
        """One that was taken and never handed out."""
        self._returned.append(slab)

    def trim(self, keep: int) -> None:
        """Drop free slabs but for `keep`, the least recently used first."""
        while self._returned:
            self._free.append(self._returned.popleft())
        while len(self._free) > keep:
            self._drop(self._free.popleft())

    def close(self) -> None:
        """Close the files; memory that is still seen stays until it is not."""
        for slab in list(self.alive.values()):
            self._drop(slab)
        self._free.clear()

    def _drop(self, slab: SharedBuffer) -> None:
        del self.alive[slab.number]
        os.close(slab.descriptor)
