"""An output in an object store: files sent in order as parts of a bounded size, and seen by nobody before the end.

There is no journal: a merge into a store that is killed begins again. What it had sent stays invisible; a rule of the
bucket that aborts incomplete uploads clears it away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.object_store import asking, filesystem
from data_pipeline.storage import join
from pretrain.merge.blocks import Workers
from pretrain.merge.journal import Done
from pretrain.merge.plan import Plan, TensorJob
from pretrain.merge.writer import Key

PART, MOST_PARTS = 16 << 20, 10_000
MEBIBYTE = 1 << 20


class Uploads:
    """Files on their way to one folder of a store.

    `begin` and `write` send a file from its start to its end; nothing appears before `publish`, and what is not
    published by then is taken back by `abort`.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._sent: list[Any] = []
        self._open: Any = None

    def begin(self, name: str, size: int) -> None:
        """The next file, of `size` bytes: S3 takes at most 10,000 parts."""
        self.end()
        part = max(PART, -(-size // (MOST_PARTS * MEBIBYTE)) * MEBIBYTE)
        url = join(self.folder, name)
        with asking(url):
            self._open = filesystem(url).open(url, "wb", block_size=part, autocommit=False)
        self._sent.append(self._open)

    def write(self, data: bytes | bytearray) -> None:
        with asking(self.folder):
            self._open.write(data)

    def end(self) -> None:
        """Send what is left of the file that was begun."""
        if self._open is not None:
            with asking(self.folder):
                self._open.close()
            self._open = None

    def add(self, name: str, content: bytes | Path) -> None:
        """A whole file: bytes, or one on a disk, read piece by piece."""
        if isinstance(content, bytes):
            self.begin(name, len(content))
            self.write(content)
            return
        self.begin(name, content.stat().st_size)
        with open(content, "rb") as file:
            while piece := file.read(MEBIBYTE):
                self.write(piece)

    def publish(self) -> None:
        """Let every file appear, in the order in which they were begun."""
        self.end()
        while self._sent:
            with asking(self.folder):
                self._sent[0].commit()
            self._sent.pop(0)

    def abort(self) -> None:
        for file in self._sent:
            with suppress(
                Exception
            ):  # the store may be what failed; the error that led here is the one to tell
                file.discard()
            file.closed = True  # else the garbage collector closes it, which would send its rest


class RemoteOutput:
    """As pretrain.merge.writer.Output: one plan's files, sent in the order of its jobs."""

    in_order = True

    def __init__(self, plan: Plan, uploads: Uploads) -> None:
        self.plan, self.uploads = plan, uploads
        self.done: dict[Key, Done] = {}
        self._file = -1

    def open(self, stack: ExitStack, workers: Workers) -> int:
        return sum(len(file.header) for file in self.plan.files)

    def put(self, job: TensorJob, start: int, stored: memoryview) -> None:
        raise NotImplementedError("an object is sent from its start to its end")

    def take(self, key: Key, done: Done, stored: bytes | bytearray) -> None:
        self._begin(self.plan.jobs[key[0]].file)
        self.uploads.write(stored)
        self.done[key] = done

    def finish(self) -> None:
        """Also the files that hold no elements."""
        self._begin(len(self.plan.files) - 1)
        self.uploads.end()

    def _begin(self, number: int) -> None:
        while self._file < number:
            self._file += 1
            file = self.plan.files[self._file]
            self.uploads.begin(file.name, file.size)
            self.uploads.write(file.header)


@contextmanager
def uploaded_folder(out: str) -> Iterator[Uploads]:
    """Files that appear below `out` when the block ends well, and not at all when it does not."""
    uploads = Uploads(out.rstrip("/"))
    try:
        yield uploads
        uploads.publish()
    except FileNotFoundError as error:
        uploads.abort()
        raise UserError(f"{out}: cannot be written: {error}; make the bucket, or correct its name") from error
    except PermissionError as error:
        uploads.abort()
        raise UserError(f"{out}: may not be written: {error}") from error
    except BaseException:
        uploads.abort()
        raise
