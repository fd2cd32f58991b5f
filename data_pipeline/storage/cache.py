"""Node-local cache of byte ranges, shared by all processes of a node, bounded in bytes.

A damaged or full cache makes reads slower but never wrong. A range is one file and is published by a rename, so every
file under its final name is whole. A process that downloads a range holds an flock on the unfinished file; the kernel
releases the lock when the process ends, however it ends. Files of an earlier boot are never read: they are not synced,
so a power failure may have destroyed their content.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import stat
import struct
import tempfile
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import xxhash

from data_pipeline import activity
from data_pipeline.storage.cache_cleanup import (
    RANGES_PREFIX,
    UNFINISHED_SUFFIX,
    WARMING_PREFIX,
    remove_leftovers,
    subfolders,
)
from data_pipeline.storage.files import read_descriptor

MAX_OPEN_FILES = 128  # per process
DOWNLOAD_TIMEOUT = 120.0  # seconds to wait for another process's download
RELEASED_AGE = 7 * 86400.0  # seconds that release() subtracts from a file's time of last use
EVICTION_TARGET = 0.9  # fraction of the limit that is in use after an eviction
MAX_DEFAULT_GIGABYTES = 100.0
COUNTER = "used"  # file that holds the bytes in use
_COUNTER_FORMAT = struct.Struct("<q")


@dataclass(frozen=True)
class CacheSettings:
    """Folder of the cache on each node, and its limit in bytes; 0 turns the cache off.

    `token` identifies one loader; its workers and its prefetcher share a status file that is named after it.
    """

    folder: str
    limit_bytes: int
    token: str = field(default_factory=lambda: secrets.token_hex(8), compare=False)

    @classmethod
    def of(cls, folder: str | None = None, gigabytes: float | None = None) -> CacheSettings:
        """Settings with defaults: the folder is $DROMOS_CACHE, else dromos-cache-UID in the temporary folder.

        `gigabytes` (of 10^9 bytes) is by default half of the disk space that is free or used by the cache, at most 100.
        """
        folder = folder or os.environ.get("DROMOS_CACHE") or default_folder()
        if gigabytes is None:
            existing = next(p for p in (Path(folder), *Path(folder).absolute().parents) if os.path.exists(p))
            # Without the bytes in the cache, every restart of a run would halve the limit again.
            available = shutil.disk_usage(existing).free + _recorded_bytes(folder)
            gigabytes = min(MAX_DEFAULT_GIGABYTES, available / 2e9)
        return cls(os.path.abspath(folder), int(gigabytes * 1e9))


def default_folder() -> str:
    return os.path.join(tempfile.gettempdir(), f"dromos-cache-{os.getuid()}")


@dataclass(frozen=True)
class ByteRange:
    """Bytes [start, stop) of the object `url` with `size` bytes and content version `version`."""

    url: str
    size: int
    version: int
    start: int
    stop: int

    @cached_property
    def name(self) -> str:
        """File name of the range in the cache: 32 hex digits."""
        text = f"{self.url}\0{self.size}\0{self.version}\0{self.start}\0{self.stop}"
        return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogateescape"))


class Cache:
    """One process's access to the cache. If the folder is unusable, it warns once and turns itself `off`."""

    def __init__(self, settings: CacheSettings) -> None:
        self.settings = settings
        self.off = settings.limit_bytes <= 0
        self._files: OrderedDict[str, int] = OrderedDict()
        self._folder = _ranges_folder(settings.folder)
        if not self.off:
            with self._off_on_error():
                _make_private(settings.folder)
                os.makedirs(self._folder, mode=0o700, exist_ok=True)
                self._lock_folder()

    def _lock_folder(self) -> None:
        """Hold a shared lock on the ranges, so that other machines with the same disk do not remove them."""
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, descriptor)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)

    @property
    def _warming_file(self) -> str:
        return os.path.join(self.settings.folder, f"{WARMING_PREFIX}{self.settings.token}")

    def warming(self) -> bool:
        """True while the prefetcher downloads its first window; reading single samples is faster until then."""
        return os.path.exists(self._warming_file)

    def set_warming(self, warming: bool) -> None:
        """Create or remove the status file that `warming` checks."""
        if warming and not self.off:
            with self._off_on_error():
                os.close(os.open(self._warming_file, os.O_CREAT | os.O_WRONLY, 0o600))
        else:
            with suppress(OSError):
                os.unlink(self._warming_file)

    def read(self, byte_range: ByteRange, start: int, stop: int) -> bytes | None:
        """Bytes [start, stop) of the object, from within a cached range; None if the range is not cached."""
        descriptor = self._open(byte_range)
        if descriptor is None:
            return None
        data = read_descriptor(descriptor, start - byte_range.start, stop - start)
        return data if len(data) == stop - start else None

    def path(self, byte_range: ByteRange) -> str:
        """Path of a range's file, which need not exist."""
        name = byte_range.name
        return os.path.join(self._folder, name[:2], name)

    def has(self, byte_range: ByteRange) -> bool:
        """True if the range is cached; sets its time of last use."""
        try:
            os.utime(self.path(byte_range))
        except OSError:
            return False
        return not self.off

    def release(self, byte_range: ByteRange) -> None:
        """Mark a range as consumed, so that it is evicted before ranges that are still to be read."""
        with suppress(OSError):
            aged = time.time() - RELEASED_AGE
            os.utime(self.path(byte_range), (aged, aged))

    def ensure(
        self, byte_range: ByteRange, chunks: Callable[[], Iterable[bytes]], timeout: float = DOWNLOAD_TIMEOUT
    ) -> bool:
        """Make a range available: download it in `chunks`, or wait for a process that downloads it already.

        Returns False if the cache is off, the range exceeds its limit, or the other process takes longer than `timeout`
        seconds. Exceptions of the download pass through.
        """
        if self.off or byte_range.stop - byte_range.start > self.settings.limit_bytes:
            return False
        with self._off_on_error():
            os.makedirs(os.path.dirname(self.path(byte_range)), mode=0o700, exist_ok=True)
            with activity.reading(byte_range.url), self._locked(byte_range, timeout) as descriptor:
                if descriptor is None:
                    return False
                if not os.path.exists(self.path(byte_range)):
                    self._download(descriptor, byte_range, chunks())
                return True
        return False

    def sweep(self) -> None:
        """Remove the files that killed processes and earlier boots left behind."""
        if not self.off:
            with self._off_on_error():
                remove_leftovers(self.settings.folder, self._folder)

    def close_files(self) -> None:
        """Close the range files that this process holds open."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _open(self, byte_range: ByteRange) -> int | None:
        name = byte_range.name
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        if self.off:
            return None
        try:
            descriptor = os.open(self.path(byte_range), os.O_RDONLY)
        except OSError:
            return None
        if os.fstat(descriptor).st_size != byte_range.stop - byte_range.start:
            os.close(descriptor)
            return None
        with suppress(OSError):
            os.utime(descriptor)  # eviction goes by time of last use
        self._files[name] = descriptor
        if len(self._files) > MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return descriptor

    @contextmanager
    def _off_on_error(self) -> Iterator[None]:
        """Turn the cache off on an OSError of its disk; errors of a download pass through."""
        try:
            yield
        except _DownloadError as failure:
            raise failure.reason from None
        except OSError as error:
            self.off = True
            warnings.warn(
                f"the cache {self.settings.folder} cannot be used ({error}): samples are read one by one from the "
                "object store, which is slow; fix it, or choose another folder: loader.cache.folder in a recipe, "
                "DROMOS_CACHE, or the argument `cache` of Stream",
                stacklevel=4,
            )

    @contextmanager
    def _locked(self, byte_range: ByteRange, timeout: float) -> Iterator[int | None]:
        """Open and lock the unfinished file of a range; None if another process holds the lock until the timeout."""
        unfinished = self.path(byte_range) + UNFINISHED_SUFFIX
        deadline = time.monotonic() + timeout
        pause = 0.005
        while True:
            descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same_file(descriptor, unfinished):
                    yield descriptor
                    return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    yield None
                    return
                time.sleep(pause)
                pause = min(2 * pause, 0.1)
            finally:
                os.close(descriptor)

    def _download(self, descriptor: int, byte_range: ByteRange, chunks: Iterable[bytes]) -> None:
        """Write the chunks to the unfinished file and publish it."""
        unfinished = self.path(byte_range) + UNFINISHED_SUFFIX
        source = iter(chunks)
        os.ftruncate(descriptor, 0)
        try:
            while True:
                try:
                    chunk = next(source)
                except StopIteration:
                    break
                except Exception as error:
                    raise _DownloadError(error) from error
                _write(descriptor, chunk)
            if os.fstat(descriptor).st_size != byte_range.stop - byte_range.start:
                raise _DownloadError(
                    OSError(
                        f"{byte_range.url}: the download of bytes {byte_range.start} to {byte_range.stop} is incomplete"
                    )
                )
            self._make_room(byte_range.stop - byte_range.start)
            os.rename(unfinished, self.path(byte_range))
        except BaseException:
            with suppress(OSError):
                os.unlink(unfinished)
            raise

    def _make_room(self, new: int) -> None:
        """Add `new` bytes to the counter; over the limit, evict the least recently used ranges."""
        with self._counter() as counter:
            stored = os.pread(counter, _COUNTER_FORMAT.size, 0)
            counted = len(stored) == _COUNTER_FORMAT.size
            used = new + (_COUNTER_FORMAT.unpack(stored)[0] if counted else self._total())
            if used > self.settings.limit_bytes:
                used = self._evict(new)
            os.pwrite(counter, _COUNTER_FORMAT.pack(used), 0)

    @contextmanager
    def _counter(self) -> Iterator[int]:
        """Open and lock the counter of bytes in use."""
        descriptor = os.open(
            os.path.join(self._folder, COUNTER), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _total(self) -> int:
        return sum(size for _, size, _ in self._list_ranges())

    def _evict(self, new: int) -> int:
        """Remove ranges until `new` more bytes fit; returns the bytes in use, `new` included."""
        remove_leftovers(self.settings.folder, self._folder)
        files = sorted(self._list_ranges())
        total = new + sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= EVICTION_TARGET * self.settings.limit_bytes:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        return total

    def _list_ranges(self) -> list[tuple[float, int, str]]:
        """(time of last use, bytes, path) of every whole range."""
        ranges = []
        for folder in subfolders(self._folder):
            with suppress(FileNotFoundError), os.scandir(folder) as entries:
                for entry in entries:
                    if not entry.name.endswith(UNFINISHED_SUFFIX):
                        with suppress(FileNotFoundError):
                            status = entry.stat()
                            ranges.append((status.st_mtime, status.st_size, entry.path))
        return ranges


class _DownloadError(Exception):
    """The download failed, not the cache's disk; `reason` is the original exception."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(reason)
        self.reason = reason


def _make_private(folder: str) -> None:
    """Create the folder for this user only: another user with write access could replace the training data."""
    os.makedirs(folder, mode=0o700, exist_ok=True)
    status = os.lstat(folder)
    if stat.S_ISLNK(status.st_mode) or not stat.S_ISDIR(status.st_mode):
        raise PermissionError("it is a link or a file, not a folder")
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError("other users may write to it")


def _ranges_folder(folder: str) -> str:
    return os.path.join(folder, f"{RANGES_PREFIX}{_boot_id()}")


def _recorded_bytes(folder: str) -> int:
    """Bytes in use according to the cache's counter; 0 if there is none."""
    with suppress(OSError, struct.error):
        used: int = _COUNTER_FORMAT.unpack(Path(_ranges_folder(folder), COUNTER).read_bytes())[0]
        return used
    return 0


def _boot_id() -> str:
    """Identifies the current boot of the machine; "always" where the kernel does not tell."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:13]
    return "always"


def _same_file(descriptor: int, path: str) -> bool:
    """True if `path` still names the open file. The previous lock holder may have renamed or removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _write(descriptor: int, data: bytes) -> None:
    """Write all of `data`; os.write may write less."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
