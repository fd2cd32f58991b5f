"""Shared memory in which a process tells its parent which URL it reads, which sample it decodes, and since when.

The watchdog uses it to name a stalled read, and the pool to attribute a crash to the sample that was being decoded.
The reader needs no lock: a sequence counter (seqlock) shows it a write in progress, and it reads again.
"""

from __future__ import annotations

import struct
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from mmap import mmap
from types import TracebackType

STATUS_BYTES = 4096  # size of a status memory

# Header: sequence counter (odd during a write), start times of the read and of the decode (0: none), the sample's shard
# and index, lengths in bytes of the two texts that follow: source name and URL.
_HEAD = struct.Struct("<QddqqHH")
_COUNT = struct.Struct("<Q")
_SOURCE, _URL = _HEAD.size, _HEAD.size + 512
_IDLE = nullcontext()

# Source name, shard, index in the shard.
Sample = tuple[str, int, int]


@dataclass(frozen=True)
class Activity:
    """Status of a process. Times are time.monotonic() in seconds, one clock for all processes of a Linux machine."""

    url: str | None = None
    reading_since: float = 0.0
    sample: Sample | None = None
    decoding_since: float = 0.0


class _Status:
    """Writer of a status memory; several threads may read files at once, one thread decodes."""

    def __init__(self, memory: mmap | bytearray) -> None:
        self.memory = memory
        self._lock = threading.Lock()
        self._writes = 0
        self._reads: dict[int, tuple[float, bytes]] = {}  # oldest first: the oldest is published
        self._sample: tuple[float, bytes, int, int] | None = None

    def begin_read(self, key: int, url: str) -> None:
        with self._lock:
            self._reads[key] = (time.monotonic(), url.encode(errors="replace")[: STATUS_BYTES - _URL])
            if len(self._reads) == 1:
                self._write()

    def end_read(self, key: int) -> None:
        with self._lock:
            del self._reads[key]
            self._write()

    def set_sample(self, sample: tuple[float, bytes, int, int] | None) -> None:
        with self._lock:
            self._sample = sample
            self._write()

    def _write(self) -> None:
        since, url = next(iter(self._reads.values())) if self._reads else (0.0, b"")
        decoding, source, shard, index = self._sample or (0.0, b"", 0, 0)
        memory, self._writes = self.memory, self._writes + 2
        _COUNT.pack_into(memory, 0, self._writes - 1)
        memory[_SOURCE : _SOURCE + len(source)] = source
        memory[_URL : _URL + len(url)] = url
        _HEAD.pack_into(memory, 0, self._writes - 1, since, decoding, shard, index, len(source), len(url))
        _COUNT.pack_into(memory, 0, self._writes)


class _Reading:
    def __init__(self, status: _Status, url: str) -> None:
        self._status, self._url = status, url

    def __enter__(self) -> None:
        self._status.begin_read(id(self), self._url)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status.end_read(id(self))


class _Decoding:
    def __init__(self, status: _Status) -> None:
        self._status = status

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status.set_sample(None)


# Module state, because it describes the process itself.
_status: _Status | None = None


def write_status_to(memory: mmap | bytearray) -> None:
    """Publish the status of this process in `memory`, STATUS_BYTES long, from now on."""
    global _status
    _status = _Status(memory)


def status_memory() -> mmap | bytearray:
    """The status memory of this process; private memory is created if `write_status_to` was never called."""
    if _status is None:
        write_status_to(bytearray(STATUS_BYTES))
    assert _status is not None
    return _status.memory


def reading(url: str) -> AbstractContextManager[None]:
    """Context of every read of a file or object: publishes its URL. Reads of several threads may overlap."""
    return _IDLE if _status is None else _Reading(_status, url)


def decoding(source: str, shard: int, index: int) -> AbstractContextManager[None]:
    """Context of decoding a sample whose bytes are complete; visible to the parent from this call on."""
    if _status is None:
        return _IDLE
    _status.set_sample((time.monotonic(), source.encode(errors="replace")[: _URL - _SOURCE], shard, index))
    return _Decoding(_status)


def read_status(memory: mmap | bytearray) -> Activity:
    """Status of the process that writes to `memory`, or its last one if it died; idle if it died during a write."""
    for _ in range(100):
        (before,) = _COUNT.unpack_from(memory, 0)
        _, since, decoded, shard, index, source, url = _HEAD.unpack_from(memory, 0)
        name, text = bytes(memory[_SOURCE : _SOURCE + source]), bytes(memory[_URL : _URL + url])
        (after,) = _COUNT.unpack_from(memory, 0)
        if before == after and not before % 2:
            return Activity(
                url=text.decode(errors="replace") if since else None,
                reading_since=since,
                sample=(name.decode(errors="replace"), shard, index) if decoded else None,
                decoding_since=decoded,
            )
    return Activity()
