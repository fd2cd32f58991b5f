"""What a process that makes batches is doing now, where another process can see it: which url it reads or sample it
decodes, and since when. So a stalled read can be named, and a crash be put down to the sample that was decoded.
"""

from __future__ import annotations

import struct
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from mmap import mmap
from types import TracebackType

STATUS_BYTES = 4096
"""Bytes of a status memory."""

# A count of writes (odd while one is going on), since when it reads and decodes (0: it does not), the sample's shard
# and index, and the lengths of the two texts that follow: its source and the url.
_HEAD = struct.Struct("<QddqqHH")
_COUNT = struct.Struct("<Q")
_SOURCE, _URL = _HEAD.size, _HEAD.size + 512
_IDLE = nullcontext()

Sample = tuple[str, int, int]
"""Source, shard, and index in the shard."""


@dataclass(frozen=True)
class Activity:
    """What a process was doing: times are of time.monotonic(), which processes of a machine share on Linux."""

    url: str | None = None
    reading_since: float = 0.0
    sample: Sample | None = None
    decoding_since: float = 0.0


class _Status:
    def __init__(self, memory: mmap | bytearray) -> None:
        self.memory = memory
        self._lock = threading.Lock()
        self._writes = 0
        self._reads: dict[int, tuple[float, bytes]] = {}  # oldest first: it is the one that is shown
        self._sample: tuple[float, bytes, int, int] | None = None

    def begin(self, key: int, url: str) -> None:
        with self._lock:
            self._reads[key] = (time.monotonic(), url.encode(errors="replace")[: STATUS_BYTES - _URL])
            if len(self._reads) == 1:
                self._write()

    def end(self, key: int) -> None:
        with self._lock:
            del self._reads[key]
            self._write()

    def decode(self, sample: tuple[float, bytes, int, int] | None) -> None:
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
        self._status.begin(id(self), self._url)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status.end(id(self))


class _Decoding:
    def __init__(self, status: _Status) -> None:
        self._status = status

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status.decode(None)


_status: _Status | None = None


def write_status_to(memory: mmap | bytearray) -> None:
    """Write what this process does to `memory`, of STATUS_BYTES bytes, from now on."""
    global _status
    _status = _Status(memory)


def own_memory() -> mmap | bytearray:
    """The memory that this process writes to; some of its own if nothing was installed."""
    if _status is None:
        write_status_to(bytearray(STATUS_BYTES))
    assert _status is not None
    return _status.memory


def reading(url: str) -> AbstractContextManager[None]:
    """Around every read of a file or object: says that it is going on. Reads may overlap, in several threads."""
    return _IDLE if _status is None else _Reading(_status, url)


def decoding(source: str, shard: int, index: int) -> AbstractContextManager[None]:
    """Around what is done with a sample's complete bytes; said from the call on."""
    if _status is None:
        return _IDLE
    _status.decode((time.monotonic(), source.encode(errors="replace")[: _URL - _SOURCE], shard, index))
    return _Decoding(_status)


def read_status(memory: mmap | bytearray) -> Activity:
    """What the process that writes to `memory` does, or did when it died. Idle if it died while it wrote."""
    for _ in range(100):
        (before,) = _COUNT.unpack_from(memory, 0)
        _, since, decoded, shard, index, source, url = _HEAD.unpack_from(memory, 0)
        name, place = bytes(memory[_SOURCE : _SOURCE + source]), bytes(memory[_URL : _URL + url])
        (after,) = _COUNT.unpack_from(memory, 0)
        if before == after and not before % 2:
            return Activity(
                url=place.decode(errors="replace") if since else None,
                reading_since=since,
                sample=(name.decode(errors="replace"), shard, index) if decoded else None,
                decoding_since=decoded,
            )
    return Activity()
