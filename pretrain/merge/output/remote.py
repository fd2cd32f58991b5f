"""An output in an object store: files sent in order as parts of a bounded size, and seen by nobody before the end.

There is no journal: a merge into a store that is killed computes again what it had computed. What it had sent is found
there and not sent again; what nobody goes on with, a rule of the bucket that aborts incomplete uploads clears away.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from data_pipeline.errors import ReadError, UserError
from data_pipeline.storage.files import exists, join, publish, read_bytes, remove
from data_pipeline.storage.object_store import EXTRAS, filesystem, store_errors
from pretrain.merge.merge_plan import Plan, TensorJob
from pretrain.merge.methods.blocks import Workers
from pretrain.merge.output.journal import Done
from pretrain.merge.output.multipart import Begun, Multipart, abort, begun_in
from pretrain.merge.output.writer import Key

PART, SMALLEST_PART, MOST_PARTS = 16 << 20, 5 << 20, 10_000
IN_MEMORY = 32 << 20
"""Bytes of the parts that are filled at once, over all outputs; S3 takes none below 5 MiB."""

SENDERS = 4  # parts that are sent at once, over all outputs; of each output at least one
MEBIBYTE = 1 << 20
MARK = ".dromos-publishing"


class Uploads:
    """Files on their way to one folder of a store.

    key:  of the plan, which stands in the folder while its files appear: what a kill leaves then is known again.
    many: outputs that are written at once, each with its own Uploads; the more, the smaller the parts.

    `begin` and `write` send a file from its start to its end; nothing appears before `publish`.
    """

    def __init__(self, folder: str, key: str, many: int = 1) -> None:
        self.folder, self._key = folder, key
        self._part = max(SMALLEST_PART, min(PART, IN_MEMORY // many // MEBIBYTE * MEBIBYTE))
        self._ahead = max(1, SENDERS // many)
        self._pool = ThreadPoolExecutor(self._ahead, thread_name_prefix="sending")
        self._is_s3 = folder.partition("://")[0] in EXTRAS
        self._earlier: dict[str, Begun] = {}
        if self._is_s3:
            self._earlier = {begun.key: begun for begun in begun_in(folder)}
        self._marked = half_published(folder, key)
        self._sent: list[Any] = []
        self._open: Any = None
        self._last = ""

    def begin(self, name: str, size: int) -> None:
        """The next file, of `size` bytes: S3 takes at most 10,000 parts."""
        self.end()
        part = max(self._part, -(-size // (MOST_PARTS * MEBIBYTE)) * MEBIBYTE)
        url = join(self.folder, name)
        if self._is_s3:
            earlier = self._earlier.get(url.partition("://")[2].partition("/")[2])
            self._open = Multipart(url, size, part, self._pool, self._ahead, earlier)
        else:
            with store_errors(url):
                self._open = filesystem(url).open(url, "wb", block_size=part, autocommit=False)
        self._last = url
        self._sent.append(self._open)

    def write(self, data: bytes | bytearray) -> None:
        with store_errors(self.folder):
            self._open.write(data)

    def end(self) -> None:
        """Send what is left of the file that was begun."""
        if self._open is not None:
            with store_errors(self.folder):
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
        """Let every file appear, in the order in which they were begun; the last one says that all are there."""
        self.end()
        if exists(self._last) or (half_published(self.folder, self._key) and not self._marked):
            raise UserError(
                f"{self.folder}: another process wrote it meanwhile; run this again to see what it is"
            )
        publish(join(self.folder, MARK), self._key.encode())
        while self._sent:
            with store_errors(self.folder):
                self._sent[0].commit()
            self._sent.pop(0)
        remove([join(self.folder, MARK)])
        if self._is_s3:  # what else a killed merge left, and uploads whose beginning was tried twice
            abort(self.folder, begun_in(self.folder))
        self._pool.shutdown()

    def stop(self, taking_back: bool) -> None:
        """Send no more. What was sent is taken back, or stays for the merge that goes on with it."""
        for file in self._sent:
            if self._is_s3:
                file.closed = True
        self._pool.shutdown(cancel_futures=True)
        for file in self._sent:
            if taking_back or not self._is_s3:
                with suppress(Exception):  # the store may have failed; the error that led here is to be told
                    file.discard()
            file.closed = True  # else the garbage collector closes it, which would send its rest
        if self._is_s3 and taking_back:
            abort(self.folder, list(self._earlier.values()))


def half_published(folder: str, key: str) -> bool:
    """Whether a kill hit the merge of plan `key` into `folder` while its files appeared. UserError: another plan's."""
    mark = join(folder, MARK)
    if not exists(mark):
        return False
    if read_bytes(mark).decode("utf-8", "replace") != key:
        raise UserError(
            f"{folder}: another merge was killed while its files appeared there; finish it with the command that began "
            "it, or remove the folder"
        )
    return True


class RemoteOutput:
    """As pretrain.merge.output.writer.Output: one plan's files, sent in the order of its jobs."""

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
def uploaded_folder(out: str, key: str, many: int = 1) -> Iterator[Uploads]:
    """Files that appear below `out` when the block ends well, and not at all when it does not; see Uploads.

    Who is stopped, or cannot read or write for now, leaves what was sent for the next time; after any other error it
    is taken back.
    """
    with _refused(out):
        uploads = Uploads(out.rstrip("/"), key, many)
    try:
        with _refused(out):
            yield uploads
            uploads.publish()
    except BaseException as error:
        uploads.stop(taking_back=not isinstance(error, KeyboardInterrupt | ReadError))
        raise


@contextmanager
def _refused(out: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{out}: cannot be written: {error}; make the bucket, or correct its name") from error
    except PermissionError as error:
        raise UserError(f"{out}: may not be written: {error}") from error
