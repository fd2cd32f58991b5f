"""`RemoteOutput`: an output in an object store. Files are uploaded in order and become visible only at the end.

There is no journal: after a kill, a merge computes everything again, but does not send again the parts that the store
already has. The next finished merge into the folder removes unused parts. If there is no next merge, set
a lifecycle rule on the bucket for incomplete uploads.
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
from pretrain.merge.output.journal import SpanRecord
from pretrain.merge.output.multipart import IncompleteUpload, MultipartUpload, abort, incomplete_uploads
from pretrain.merge.output.writer import SpanKey

PART = 16 << 20  # bytes
SMALLEST_PART, MAX_PARTS = 5 << 20, 10_000  # S3's limits: bytes per part, parts per object
BUFFER_BYTES = 32 << 20  # of the parts that are being filled, over all outputs
SENDERS = 4  # parts in flight over all outputs; at least one per output
MEBIBYTE = 1 << 20
# Object that holds the plan's key while files are made visible, so that a killed merge can resume.
MARK = ".dromos-publishing"


class Uploads:
    """Uploads of the files of one folder. `begin` and `write` send a file sequentially; `publish` makes all visible.

    key:     key of the plan, stored in MARK while the files become visible.
    outputs: number of outputs that are written at once, each with its own Uploads; more outputs mean smaller parts.
    """

    def __init__(self, folder: str, key: str, outputs: int = 1) -> None:
        self.folder, self._key = folder, key
        self._part = max(SMALLEST_PART, min(PART, BUFFER_BYTES // outputs // MEBIBYTE * MEBIBYTE))
        self._ahead = max(1, SENDERS // outputs)
        self._pool = ThreadPoolExecutor(self._ahead, thread_name_prefix="sending")
        self._is_s3 = folder.partition("://")[0] in EXTRAS
        self._earlier: dict[str, IncompleteUpload] = {}
        if self._is_s3:
            self._earlier = {upload.key: upload for upload in incomplete_uploads(folder)}
        self._was_half_published = half_published(folder, key)
        self._files: list[Any] = []
        self._current: Any = None
        self._last_url = ""

    def begin(self, name: str, size: int) -> None:
        """Finish the current file and start the next one, of `size` bytes."""
        self.end()
        part = max(self._part, -(-size // (MAX_PARTS * MEBIBYTE)) * MEBIBYTE)
        url = join(self.folder, name)
        if self._is_s3:
            earlier = self._earlier.get(url.partition("://")[2].partition("/")[2])
            self._current = MultipartUpload(url, size, part, self._pool, self._ahead, earlier)
        else:
            with store_errors(url):
                self._current = filesystem(url).open(url, "wb", block_size=part, autocommit=False)
        self._last_url = url
        self._files.append(self._current)

    def write(self, data: bytes | bytearray) -> None:
        """Append `data` to the current file."""
        with store_errors(self.folder):
            self._current.write(data)

    def end(self) -> None:
        """Send the rest of the current file."""
        if self._current is not None:
            with store_errors(self.folder):
                self._current.close()
            self._current = None

    def add(self, name: str, content: bytes | Path) -> None:
        """Upload a whole file: `content`, or a local file, read in pieces."""
        if isinstance(content, bytes):
            self.begin(name, len(content))
            self.write(content)
            return
        self.begin(name, content.stat().st_size)
        with open(content, "rb") as file:
            while piece := file.read(MEBIBYTE):
                self.write(piece)

    def publish(self) -> None:
        """Make every file visible in the order of `begin`; the last file (merge.json) marks a complete output.

        Raises UserError if another process published to the folder meanwhile.
        """
        self.end()
        if exists(self._last_url) or (
            half_published(self.folder, self._key) and not self._was_half_published
        ):
            raise UserError(
                f"{self.folder}: another process wrote this folder meanwhile; run this again to see if it "
                "is the same merge"
            )
        publish(join(self.folder, MARK), self._key.encode())
        while self._files:
            with store_errors(self.folder):
                self._files[0].commit()
            self._files.pop(0)
        remove([join(self.folder, MARK)])
        if self._is_s3:  # other uploads of a killed merge, and uploads that a retry created twice
            abort(self.folder, incomplete_uploads(self.folder))
        self._pool.shutdown()

    def stop(self, abort_uploads: bool) -> None:
        """Stop sending. Uploads are aborted, or kept for the merge that resumes."""
        for file in self._files:
            if self._is_s3:
                file.closed = True
        self._pool.shutdown(cancel_futures=True)
        for file in self._files:
            if abort_uploads or not self._is_s3:
                # The store may be down; the error that stopped the merge is the one to report.
                with suppress(Exception):
                    file.discard()
            file.closed = True  # otherwise the garbage collector closes it, which would send the rest
        if self._is_s3 and abort_uploads:
            abort(self.folder, list(self._earlier.values()))


def half_published(folder: str, key: str) -> bool:
    """True if a merge of plan `key` was killed while its files in `folder` became visible.

    Raises UserError if it was a merge of another plan.
    """
    mark = join(folder, MARK)
    if not exists(mark):
        return False
    if read_bytes(mark).decode("utf-8", "replace") != key:
        raise UserError(
            f"{folder}: another merge was killed while its files became visible; finish it with the command that "
            "started it, or remove the folder"
        )
    return True


class RemoteOutput:
    """An `Output` (pretrain.merge.output.writer) that uploads one plan's files in the order of its jobs."""

    sequential = True

    def __init__(self, plan: Plan, uploads: Uploads) -> None:
        self.plan, self.uploads = plan, uploads
        self.done: dict[SpanKey, SpanRecord] = {}
        self._file_index = -1

    def open(self, stack: ExitStack, workers: Workers) -> int:
        return sum(len(file.header) for file in self.plan.files)

    def write_block(self, job: TensorJob, start: int, stored: memoryview) -> None:
        raise NotImplementedError("objects are uploaded sequentially")

    def finish_span(self, key: SpanKey, record: SpanRecord, stored: bytes | bytearray) -> None:
        self._begin_up_to(self.plan.jobs[key[0]].file)
        self.uploads.write(stored)
        self.done[key] = record

    def finish(self) -> None:
        """Start the remaining files, which contain no elements, and end the last one."""
        self._begin_up_to(len(self.plan.files) - 1)
        self.uploads.end()

    def _begin_up_to(self, number: int) -> None:
        while self._file_index < number:
            self._file_index += 1
            file = self.plan.files[self._file_index]
            self.uploads.begin(file.name, file.size)
            self.uploads.write(file.header)


@contextmanager
def uploaded_folder(out: str, key: str, outputs: int = 1) -> Iterator[Uploads]:
    """Yield the Uploads of `out`; publish them when the block succeeds, and publish nothing when it fails.

    After KeyboardInterrupt or ReadError, the sent parts are kept for the next run; after any other error they are
    aborted. Raises UserError if the bucket does not exist or writing is not permitted.
    """
    with _user_errors(out):
        uploads = Uploads(out.rstrip("/"), key, outputs)
    try:
        with _user_errors(out):
            yield uploads
            uploads.publish()
    except BaseException as error:
        uploads.stop(abort_uploads=not isinstance(error, KeyboardInterrupt | ReadError))
        raise


@contextmanager
def _user_errors(out: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(
            f"{out}: cannot be written: {error}; create the bucket, or correct its name"
        ) from error
    except PermissionError as error:
        raise UserError(f"{out}: permission denied: {error}") from error
