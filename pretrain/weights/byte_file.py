"""Bytes of files of weights at any offset, mapped from a disk or fetched from an object store in a bounded memory."""

from __future__ import annotations

import mmap
import os
import stat
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from data_pipeline.errors import UserError
from data_pipeline.storage import object_store
from data_pipeline.storage.files import is_remote, local_path, read_descriptor

MAX_BLOCK_BYTES, MIN_BLOCK_BYTES = 8 << 20, 1 << 20
CACHE_BYTES = 64 << 20
"""Bytes that the blocks of one source take, however many files it has (with 1 MiB blocks: from 22 files on, more)."""
PARALLEL_FETCHES = 4  # blocks of one source that are asked for at once


class ByteFile(Protocol):
    """A file that is only read. `name` is what people know it by; every error names it.

    read(start, stop):  a read-only view of these bytes; from a store through blocks that are kept and read ahead.
    peek(start, stop):  the same for headers: exactly these bytes are fetched, none are kept.
    check_unchanged():  UserError when the file is not the one that was opened.
    identity:           what changes when the file does, without reading it: size and ETag, or size and time.
    """

    name: str
    size: int

    @property
    def remote(self) -> bool: ...

    @property
    def identity(self) -> str: ...

    def read(self, start: int, stop: int) -> memoryview: ...

    def peek(self, start: int, stop: int) -> bytes: ...

    def check_unchanged(self) -> None: ...


class LocalFile:
    """A regular file, mapped: reading touches only its own pages, and nothing is copied."""

    remote = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        try:
            # A pipe would wait for a writer without O_NONBLOCK.
            descriptor = os.open(self.name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UserError(f"{self.name}: not found") from None
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read: {error.strerror or error}") from None
        try:
            self._stat = os.fstat(descriptor)
            if not stat.S_ISREG(self._stat.st_mode):
                raise UserError(f"{self.name}: is no file; name a file of weights")
            self.size = self._stat.st_size
            self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) if self.size else None
            self._view = memoryview(self._map if self._map is not None else b"")
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def __del__(self) -> None:
        if (descriptor := getattr(self, "_descriptor", None)) is not None:
            os.close(descriptor)

    @property
    def identity(self) -> str:
        return f"{self.size} bytes, changed at {self._stat.st_mtime_ns}"

    def read(self, start: int, stop: int) -> memoryview:
        self.check_unchanged()  # pages beyond the new end of a file would kill the process
        return self._view[start:stop]

    def peek(self, start: int, stop: int) -> bytes:
        return read_descriptor(self._descriptor, start, stop - start)

    def check_unchanged(self) -> None:
        now = os.fstat(self._descriptor)
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            raise UserError(f"{self.name}: was changed while it was read; merge again when it is complete")


class BlockCache:
    """BlockCache of the remote files of one source, fetched by a few threads, the least recently used dropped."""

    def __init__(self, files: int) -> None:
        share = CACHE_BYTES // (3 * max(1, files))
        self.size = max(MIN_BLOCK_BYTES, min(MAX_BLOCK_BYTES, share))
        self._keep = max(3 * files, CACHE_BYTES // self.size)
        self._pool = ThreadPoolExecutor(PARALLEL_FETCHES, thread_name_prefix="weights")
        self._held: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, file: RemoteFile, number: int) -> bytes:
        """Block `number` of `file`; the next one is asked for where the one before was read too."""
        with self._lock:
            wanted = self._ask(file, number)
            if (file.name, number - 1) in self._held and (number + 1) * self.size < file.size:
                self._ask(file, number + 1)
            while len(self._held) > self._keep:
                self._held.popitem(last=False)  # one on its way may still be waited for
        try:
            return wanted.result()
        except BaseException:
            with self._lock:
                if self._held.get((file.name, number)) is wanted:
                    del self._held[file.name, number]
            raise

    def _ask(self, file: RemoteFile, number: int) -> Future[bytes]:
        key = file.name, number
        if key not in self._held:
            start = number * self.size
            stop = min(start + self.size, file.size)
            self._held[key] = self._pool.submit(file.peek, start, stop)
        self._held.move_to_end(key)
        return self._held[key]


class RemoteFile:
    """An object: every range is the one that was opened, by its size and ETag, or the read is an error."""

    remote = True

    def __init__(self, url: str, blocks: BlockCache | None = None) -> None:
        self.name = url
        self._info = _information(url)
        self.size = self._info[0]
        self._blocks = blocks or BlockCache(1)

    @property
    def identity(self) -> str:
        return f"{self.size} bytes, ETag {self._info[1]}"

    def read(self, start: int, stop: int) -> memoryview:
        size = self._blocks.size
        first, last = start // size, max(start, stop - 1) // size
        if first == last:
            return memoryview(self._blocks.get(self, first))[start - first * size : stop - first * size]
        out = bytearray(stop - start)
        for number in range(first, last + 1):
            low, high = max(start, number * size), min(stop, (number + 1) * size)
            block = memoryview(self._blocks.get(self, number))
            out[low - start : high - start] = block[low - number * size : high - number * size]
        return memoryview(out).toreadonly()

    def peek(self, start: int, stop: int) -> bytes:
        if start >= stop:
            return b""
        try:
            data = object_store.read(self.name, start, stop)
        except FileNotFoundError:
            raise self._changed() from None
        except UserError:
            self.check_unchanged()
            raise
        # The same ETag after the answer as at the beginning: what came is what was opened.
        self.check_unchanged()
        if len(data) != stop - start:
            raise self._changed()
        return data

    def check_unchanged(self) -> None:
        try:
            now = _information(self.name)
        except UserError:
            raise self._changed() from None
        if now != self._info:
            raise self._changed()

    def _changed(self) -> UserError:
        return UserError(f"{self.name}: was changed while it was read; merge again when it is complete")


def _information(url: str) -> tuple[int, str]:
    """Size and ETag of an object; the size alone where the store has no ETags."""

    def call(store: Any) -> dict[str, Any]:
        return store.info(url)

    try:
        found = object_store.with_retries(url, call)
    except FileNotFoundError:
        raise UserError(f"{url}: not found") from None
    if found.get("type") == "directory":
        raise UserError(f"{url}: is a folder; name a file of weights")
    return int(found["size"] or 0), str(found.get("ETag", ""))


def open_file(url: str | os.PathLike[str], blocks: BlockCache | None = None) -> ByteFile:
    """A file on a disk or in an object store; the remote files of one source share `blocks`."""
    url = os.fspath(url)
    return RemoteFile(url, blocks) if is_remote(url) else LocalFile(local_path(url))
