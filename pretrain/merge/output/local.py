"""One plan's files in a folder on a disk: spans are put in their places in any order, and noted in the journal."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from pretrain.merge.merge_plan import Plan, TensorJob
from pretrain.merge.methods.blocks import Workers
from pretrain.merge.output.journal import Done, Journal
from pretrain.merge.output.writer import Key
from pretrain.weights.dtypes import DTYPES, ELEMENTS_PER_SPAN, elements


@dataclass
class LocalOutput:
    """As pretrain.merge.output.writer.Output. `done` is what the journal says, as far as it stands in the files."""

    plan: Plan
    folder: Path
    journal: Journal
    files: list[int] = field(default_factory=list)
    in_order = False

    @property
    def done(self) -> dict[Key, Done]:
        return self.journal.done

    def open(self, stack: ExitStack, workers: Workers) -> int:
        """Every file with its header and all the room it needs: a full disk is found before the work."""
        for file in self.plan.files:
            opened = os.open(self.folder / file.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            stack.callback(os.close, opened)
            self.files.append(opened)
            if os.fstat(opened).st_size != file.size:
                _reserve(opened, file.size)
            _write_at(opened, file.header, 0)
        return sum(len(file.header) for file in self.plan.files) + self._keep_what_is_there(workers)

    def put(self, job: TensorJob, start: int, stored: memoryview) -> None:
        _write_at(self.files[job.file], stored, job.offset + start * DTYPES[job.dtype].itemsize)

    def take(self, key: Key, done: Done, stored: bytes | bytearray) -> None:
        self.journal.add(*key, done)

    def finish(self) -> None: ...

    def _keep_what_is_there(self, workers: Workers) -> int:
        """Forget journalled spans that do not stand in the file as they were written; bytes of the others."""
        kept = 0
        for key, size in list(workers.each(lambda key: (key, self._standing(key)), list(self.done))):
            if size is None:
                del self.done[key]
            kept += size or 0
        return kept

    def _standing(self, key: Key) -> int | None:
        """Bytes of a span, if what is in the file is what was written."""
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
    """Take the space at once, so that a full disk is found before the work and not at its end."""
    os.ftruncate(file, size)
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _write_at(file: int, data: bytes | memoryview, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(file, view, at)
        view, at = view[done:], at + done
