"""A cache of byte ranges in a folder of this machine, shared by all its processes: never wrong, never in the way.

A range is one file, published by a rename, so a file that is there is whole. Who downloads one holds the lock on its
unfinished file; the kernel releases that lock with the process, however it ends. Files of an earlier boot are not
looked at: their content may have been lost with the power.
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
from data_pipeline.storage.cache_cleanup import RANGES, UNFINISHED, WARMING, folders, remove_leftovers
from data_pipeline.storage.files import read_descriptor

FILES = 128  # kept open for reading by each process
LONGEST_WAIT = 120.0  # seconds for another process's download
USED_UP = 7 * 86400.0  # seconds by which what was used up looks older than it is
FULL_TO = 0.9  # share of the limit that eviction leaves
MOST_GIGABYTES = 100.0
COUNTER = "used"
_USED = struct.Struct("<q")


@dataclass(frozen=True)
class CacheSettings:
    """Where downloaded ranges are kept on each node, and how many bytes of them at most; 0 keeps none.

    `token` is of one loader: its workers and its prefetcher find each other by it.
    """

    folder: str
    limit_bytes: int
    token: str = field(default_factory=lambda: secrets.token_hex(8), compare=False)

    @classmethod
    def of(cls, folder: str | None = None, gigabytes: float | None = None) -> CacheSettings:
        """`folder` is DROMOS_CACHE or dromos-cache-UID among the temporary files unless it is given, `gigabytes`
        (of 10^9 bytes) half of what is free there but for what the cache holds already, at most 100."""
        place = folder or os.environ.get("DROMOS_CACHE") or default_folder()
        if gigabytes is None:
            above = next(p for p in (Path(place), *Path(place).absolute().parents) if os.path.exists(p))
            # A restarted run would else halve what is left again and again.
            gigabytes = min(MOST_GIGABYTES, (shutil.disk_usage(above).free + _held(place)) / 2e9)
        return cls(os.path.abspath(place), int(gigabytes * 1e9))


def default_folder() -> str:
    return os.path.join(tempfile.gettempdir(), f"dromos-cache-{os.getuid()}")


@dataclass(frozen=True)
class ByteRange:
    """Bytes [start, stop) of the object `url` as it was when it had `size` bytes and the version `version`."""

    url: str
    size: int
    version: int
    start: int
    stop: int

    @cached_property
    def name(self) -> str:
        text = f"{self.url}\0{self.size}\0{self.version}\0{self.start}\0{self.stop}"
        return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogateescape"))


class Cache:
    """The cache as one process sees it. Where its folder cannot be used it says so once, keeps nothing, and every
    `read` finds nothing."""

    def __init__(self, settings: CacheSettings) -> None:
        self.settings = settings
        self.off = settings.limit_bytes <= 0
        self._files: OrderedDict[str, int] = OrderedDict()
        self._folder = _ranges(settings.folder)
        if not self.off:
            with self._writing():
                _make_private(settings.folder)
                os.makedirs(self._folder, mode=0o700, exist_ok=True)
                self._hold()

    def _hold(self) -> None:
        """Show other machines, where they share the folder, that this one's ranges are in use."""
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, descriptor)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)

    @property
    def _warming_file(self) -> str:
        return os.path.join(self.settings.folder, f"{WARMING}{self.settings.token}")

    def warming(self) -> bool:
        """Is a prefetcher still at the first window? Then it is faster to read a sample alone."""
        return os.path.exists(self._warming_file)

    def set_warming(self, warming: bool) -> None:
        if warming and not self.off:
            with self._writing():
                os.close(os.open(self._warming_file, os.O_CREAT | os.O_WRONLY, 0o600))
        else:
            with suppress(OSError):
                os.unlink(self._warming_file)

    def read(self, part: ByteRange, start: int, stop: int) -> bytes | None:
        """Bytes [start, stop) of the object, which lie in `part`; None if that is not here."""
        descriptor = self._open(part)
        if descriptor is None:
            return None
        data = read_descriptor(descriptor, start - part.start, stop - start)
        return data if len(data) == stop - start else None

    def path(self, part: ByteRange) -> str:
        """Of the file of a range, there or not."""
        name = part.name
        return os.path.join(self._folder, name[:2], name)

    def has(self, part: ByteRange) -> bool:
        """Is it here? Asking counts as a use."""
        try:
            os.utime(self.path(part))
        except OSError:
            return False
        return not self.off

    def release(self, part: ByteRange) -> None:
        """It is used up for now: where room is needed, it goes before what waits to be used."""
        with suppress(OSError):
            then = time.time() - USED_UP
            os.utime(self.path(part), (then, then))

    def ensure(
        self, part: ByteRange, pieces: Callable[[], Iterable[bytes]], patience: float = LONGEST_WAIT
    ) -> bool:
        """Have a range here: downloaded by this process from `pieces`, or by another that is at it already.

        False if that is not to be: the cache is off, or the other takes longer than `patience` seconds. What the
        download raises is raised.
        """
        if self.off or part.stop - part.start > self.settings.limit_bytes:
            return False
        with self._writing():
            os.makedirs(os.path.dirname(self.path(part)), mode=0o700, exist_ok=True)
            with activity.reading(part.url), self._locked(part, patience) as descriptor:
                if descriptor is None:
                    return False
                if not os.path.exists(self.path(part)):
                    self._download(descriptor, part, pieces())
                return True
        return False

    def sweep(self) -> None:
        """Remove what killed processes and earlier boots left here."""
        if not self.off:
            with self._writing():
                remove_leftovers(self.settings.folder, self._folder)

    def forget(self) -> None:
        """Close open files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _open(self, part: ByteRange) -> int | None:
        name = part.name
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        if self.off:
            return None
        try:
            descriptor = os.open(self.path(part), os.O_RDONLY)
        except OSError:
            return None
        if os.fstat(descriptor).st_size != part.stop - part.start:
            os.close(descriptor)
            return None
        with suppress(OSError):
            os.utime(descriptor)  # what was used last is evicted last
        self._files[name] = descriptor
        if len(self._files) > FILES:
            os.close(self._files.popitem(last=False)[1])
        return descriptor

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A folder that cannot be written to, or a full disk, turns the cache off; a failed download does not."""
        try:
            yield
        except _Download as download:
            raise download.reason from None
        except OSError as error:
            self.off = True
            warnings.warn(
                f"the cache {self.settings.folder} cannot be used ({error}): samples are read one by one from the "
                "object store, which is slow; mend that, or set loader.cache.folder or DROMOS_CACHE to another folder",
                stacklevel=4,
            )

    @contextmanager
    def _locked(self, part: ByteRange, patience: float) -> Iterator[int | None]:
        """The unfinished file of a range, opened and held; None if another process holds it all the time."""
        unfinished = self.path(part) + UNFINISHED
        until = time.monotonic() + patience
        pause = 0.005
        while True:
            descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same_file(descriptor, unfinished):
                    yield descriptor
                    return
            except BlockingIOError:
                if time.monotonic() > until:
                    yield None
                    return
                time.sleep(pause)
                pause = min(2 * pause, 0.1)
            finally:
                os.close(descriptor)

    def _download(self, descriptor: int, part: ByteRange, pieces: Iterable[bytes]) -> None:
        """Fill the unfinished file and publish it."""
        unfinished = self.path(part) + UNFINISHED
        source = iter(pieces)
        os.ftruncate(descriptor, 0)
        try:
            while True:
                try:
                    piece = next(source)
                except StopIteration:
                    break
                except Exception as error:
                    raise _Download(error) from error
                _write(descriptor, piece)
            if os.fstat(descriptor).st_size != part.stop - part.start:
                raise _Download(OSError(f"{part.url}: bytes {part.start} to {part.stop} came incomplete"))
            self._make_room(part.stop - part.start)
            os.rename(unfinished, self.path(part))
        except BaseException:
            with suppress(OSError):
                os.unlink(unfinished)
            raise

    def _make_room(self, new: int) -> None:
        """Count `new` bytes; where that is more than the limit, remove what was used longest ago."""
        with self._counter() as counter:
            written = os.pread(counter, _USED.size, 0)
            used = new + (_USED.unpack(written)[0] if len(written) == _USED.size else self._total())
            if used > self.settings.limit_bytes:
                used = self._evict(new)
            os.pwrite(counter, _USED.pack(used), 0)

    @contextmanager
    def _counter(self) -> Iterator[int]:
        descriptor = os.open(
            os.path.join(self._folder, COUNTER), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _total(self) -> int:
        return sum(size for _, size, _ in self._all())

    def _evict(self, new: int) -> int:
        remove_leftovers(self.settings.folder, self._folder)
        files = sorted(self._all())
        total = new + sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= FULL_TO * self.settings.limit_bytes:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        return total

    def _all(self) -> list[tuple[float, int, str]]:
        """(time of last use, bytes, path) of every whole range."""
        found = []
        for folder in folders(self._folder):
            with suppress(FileNotFoundError), os.scandir(folder) as entries:
                for entry in entries:
                    if not entry.name.endswith(UNFINISHED):
                        with suppress(FileNotFoundError):
                            about = entry.stat()
                            found.append((about.st_mtime, about.st_size, entry.path))
        return found


class _Download(Exception):
    """The download failed, not the disk."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(reason)
        self.reason = reason


def _make_private(folder: str) -> None:
    """A folder of this user's alone: whoever else can put files there could change the data."""
    os.makedirs(folder, mode=0o700, exist_ok=True)
    about = os.lstat(folder)
    if stat.S_ISLNK(about.st_mode) or not stat.S_ISDIR(about.st_mode):
        raise PermissionError("it is a link or a file, not a folder")
    if about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise PermissionError("others than this user may write to it")


def _ranges(folder: str) -> str:
    return os.path.join(folder, f"{RANGES}{_boot()}")


def _held(folder: str) -> int:
    """Bytes in a cache, as its processes count them."""
    with suppress(OSError, struct.error):
        used: int = _USED.unpack(Path(_ranges(folder), COUNTER).read_bytes())[0]
        return used
    return 0


def _boot() -> str:
    """Names the time since the machine was started."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:13]
    return "always"


def _same_file(descriptor: int, path: str) -> bool:
    """Is the open file still the one of that name? Its last holder may have renamed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
