"""Random access to the bytes of a weight file, in bounded memory.

A local file is memory-mapped. A remote object is fetched in blocks that an LRU cache holds and reads ahead.
"""

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
# Target size of a source's cache in bytes. From 22 files on the cache is larger, because it holds at least three blocks
# of 1 MiB per file.
CACHE_BYTES = 64 << 20
PARALLEL_FETCHES = 4  # concurrent block requests per source


class ByteFile(Protocol):
    """A read-only file. `name` is its path or URL; every error contains it.

    read(start, stop):  a read-only view of these bytes; a remote file reads through its block cache.
    peek(start, stop):  the same bytes without the cache, for headers: fetches exactly this range.
    check_unchanged():  raises UserError if the file differs from the one that was opened.
    identity:           changes when the file changes and needs no read: size and ETag, or size and mtime.
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
    """A memory-mapped regular file: a read touches only the pages of its range and copies nothing."""

    remote = False

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.name = os.fspath(path)
        try:
            # Without O_NONBLOCK, opening a pipe waits for a writer.
            descriptor = os.open(self.name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UserError(f"{self.name}: not found") from None
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read: {error.strerror or error}") from None
        try:
            self._stat = os.fstat(descriptor)
            if not stat.S_ISREG(self._stat.st_mode):
                raise UserError(f"{self.name}: is not a regular file; name a weight file")
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
        self.check_unchanged()  # reading mapped pages beyond the new end of a truncated file raises SIGBUS
        return self._view[start:stop]

    def peek(self, start: int, stop: int) -> bytes:
        return read_descriptor(self._descriptor, start, stop - start)

    def check_unchanged(self) -> None:
        now = os.fstat(self._descriptor)
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            raise _changed(self.name)


class BlockCache:
    """LRU cache of the blocks of a source's remote files; PARALLEL_FETCHES threads fetch them."""

    def __init__(self, files: int) -> None:
        share = CACHE_BYTES // (3 * max(1, files))
        self.size = max(MIN_BLOCK_BYTES, min(MAX_BLOCK_BYTES, share))
        self._keep = max(3 * files, CACHE_BYTES // self.size)
        self._pool = ThreadPoolExecutor(PARALLEL_FETCHES, thread_name_prefix="weights")
        self._cached: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, file: RemoteFile, number: int) -> bytes:
        """Return block `number` of `file`; prefetch the next one if the previous one is cached (sequential reads)."""
        with self._lock:
            block = self._fetch(file, number)
            if (file.name, number - 1) in self._cached and (number + 1) * self.size < file.size:
                self._fetch(file, number + 1)
            while len(self._cached) > self._keep:
                self._cached.popitem(last=False)  # a fetch in flight still completes for its waiters
        try:
            return block.result()
        except BaseException:
            with self._lock:
                if self._cached.get((file.name, number)) is block:
                    del self._cached[file.name, number]
            raise

    def _fetch(self, file: RemoteFile, number: int) -> Future[bytes]:
        key = file.name, number
        if key not in self._cached:
            start = number * self.size
            stop = min(start + self.size, file.size)
            self._cached[key] = self._pool.submit(file.peek, start, stop)
        self._cached.move_to_end(key)
        return self._cached[key]


class RemoteFile:
    """An object in an object store. A read fails if the object's size or ETag changed since it was opened."""

    remote = True

    def __init__(self, url: str, blocks: BlockCache | None = None) -> None:
        self.name = url
        self._info = _size_and_etag(url)
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
            raise _changed(self.name) from None
        except UserError:
            self.check_unchanged()
            raise
        # The ETag is compared after the read, so the bytes belong to the object that was opened.
        self.check_unchanged()
        if len(data) != stop - start:
            raise _changed(self.name)
        return data

    def check_unchanged(self) -> None:
        try:
            now = _size_and_etag(self.name)
        except UserError:
            raise _changed(self.name) from None
        if now != self._info:
            raise _changed(self.name)


def _changed(name: str) -> UserError:
    return UserError(f"{name}: changed while it was being read; run again when it is complete")


def _size_and_etag(url: str) -> tuple[int, str]:
    """Size in bytes and ETag of an object; the ETag is empty if the store has none."""

    def call(store: Any) -> dict[str, Any]:
        return store.info(url)

    try:
        info = object_store.with_retries(url, call)
    except FileNotFoundError:
        raise UserError(f"{url}: not found") from None
    if info.get("type") == "directory":
        raise UserError(f"{url}: is a folder; name a weight file")
    return int(info["size"] or 0), str(info.get("ETag", ""))


def open_file(url: str | os.PathLike[str], blocks: BlockCache | None = None) -> ByteFile:
    """Open a local path or an object-store URL; the remote files of a source share the cache `blocks`."""
    url = os.fspath(url)
    return RemoteFile(url, blocks) if is_remote(url) else LocalFile(local_path(url))
