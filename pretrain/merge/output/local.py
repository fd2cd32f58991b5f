"""`LocalOutput`: one plan's files in a folder, written at any offset in any order; a journal records finished spans."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from pretrain.merge.merge_plan import Plan, TensorJob
from pretrain.merge.methods.blocks import Workers
from pretrain.merge.output.journal import Journal, SpanRecord
from pretrain.merge.output.writer import SpanKey
from pretrain.weights.dtypes import DTYPES, ELEMENTS_PER_SPAN, elements


@dataclass
class LocalOutput:
    """An `Output` (pretrain.merge.output.writer) in a folder.

    `done` has the spans of the journal; `open` removes those whose bytes in the files differ from their digest.
    """

    plan: Plan
    folder: Path
    journal: Journal
    files: list[int] = field(default_factory=list)
    sequential = False

    @property
    def done(self) -> dict[SpanKey, SpanRecord]:
        return self.journal.done

    def open(self, stack: ExitStack, workers: Workers) -> int:
        """Create the files at full size, so that a full disk is an error before the work starts; write headers."""
        for file in self.plan.files:
            opened = os.open(self.folder / file.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            stack.callback(os.close, opened)
            self.files.append(opened)
            if os.fstat(opened).st_size != file.size:
                _reserve(opened, file.size)
            _write_at(opened, file.header, 0)
        return sum(len(file.header) for file in self.plan.files) + self._check_journal(workers)

    def write_block(self, job: TensorJob, start: int, stored: memoryview) -> None:
        _write_at(self.files[job.file], stored, job.offset + start * DTYPES[job.dtype].itemsize)

    def finish_span(self, key: SpanKey, record: SpanRecord, stored: bytes | bytearray) -> None:
        self.journal.add(*key, record)

    def finish(self) -> None: ...

    def _check_journal(self, workers: Workers) -> int:
        """Remove spans from `done` whose bytes in the file differ from their digest; return the bytes of the rest."""
        kept = 0
        for key, size in list(workers.map(lambda key: (key, self._intact_bytes(key)), list(self.done))):
            if size is None:
                del self.done[key]
            kept += size or 0
        return kept

    def _intact_bytes(self, key: SpanKey) -> int | None:
        """Size of a span in bytes if the file still has the bytes of its digest; else None."""
        job = self.plan.jobs[key[0]]
        size = DTYPES[job.dtype].itemsize
        at = job.offset + key[1] * ELEMENTS_PER_SPAN * size
        length = min(ELEMENTS_PER_SPAN, elements(job.shape) - key[1] * ELEMENTS_PER_SPAN) * size
        digest, left = xxhash.xxh64(), length
        while left and (data := os.pread(self.files[job.file], min(left, 1 << 20), at + length - left)):
            digest.update(data)
            left -= len(data)
        return length if digest.hexdigest() == self.done[key].digest else None


def _reserve(file: int, size: int) -> None:
    """Allocate the file's space; file systems without fallocate only get the size."""
    os.ftruncate(file, size)
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _write_at(file: int, data: bytes | memoryview, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, at)
        view, at = view[written:], at + written
