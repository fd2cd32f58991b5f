"""`MultipartUpload`: one S3 object, uploaded as parallel parts in bounded memory; invisible until it is completed.

After a kill, the next process lists the ETags of the parts; a part whose MD5 equals its ETag is not sent again.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.storage.object_store import error_status, filesystem, with_retries

SMALL_OBJECT_BYTES = 1 << 20  # objects up to this size are sent by a single put when they are committed
NO_SUCH_UPLOAD = "NoSuchUpload"  # S3's error code for an upload that was completed or aborted


@dataclass
class IncompleteUpload:
    """A multipart upload that was neither completed nor aborted."""

    key: str
    upload: str


def incomplete_uploads(folder: str) -> list[IncompleteUpload]:
    """Incomplete uploads directly in a folder; an empty list if listing them is not permitted.

    Uploads in subfolders belong to other jobs, so a merge neither resumes nor aborts them.
    """
    try:
        return with_retries(folder, lambda store: list(_list_uploads(store, folder)))
    except UserError:
        return []


def abort(folder: str, uploads: list[IncompleteUpload]) -> None:
    """Abort uploads and free their parts. Failures are ignored; a lifecycle rule of the bucket removes the rest."""
    if not uploads:
        return
    store = filesystem(folder)
    bucket = store.split_path(folder)[0]
    for upload in uploads:
        # The store may be down; the error that caused the abort is the one to report.
        with suppress(Exception):
            store.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload.key, UploadId=upload.upload)


def _list_uploads(store: Any, folder: str) -> Iterator[IncompleteUpload]:
    bucket, key, _ = store.split_path(folder)
    page: dict[str, Any] = {}
    while True:
        answer = store.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/", **page)
        for entry in answer.get("Uploads", []):
            if "/" in entry["Key"][len(key) + 1 :]:
                continue
            yield IncompleteUpload(entry["Key"], entry["UploadId"])
        if not answer.get("IsTruncated"):
            return
        page = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}


def _etags(store: Any, bucket: str, upload: IncompleteUpload) -> dict[int, str]:
    """Part number -> ETag, which is the part's MD5 unless the store encrypts."""
    etags: dict[int, str] = {}
    page: dict[str, Any] = {}
    while True:
        answer = store.call_s3("list_parts", Bucket=bucket, Key=upload.key, UploadId=upload.upload, **page)
        etags |= {part["PartNumber"]: part["ETag"] for part in answer.get("Parts", [])}
        if not answer.get("IsTruncated"):
            return etags
        page = {"PartNumberMarker": answer["NextPartNumberMarker"]}


class MultipartUpload:
    """An object of `size` bytes, written sequentially in parts of `part` bytes, up to `ahead` of them in flight.

    earlier: upload of this object by a killed process; its identical parts are reused.
    closed:  set by the owner to stop sending.

    Methods raise UserError if the store refuses a request, FileNotFoundError if there is no such bucket, and ReadError
    if the store stays unavailable.
    """

    def __init__(
        self,
        url: str,
        size: int,
        part: int,
        pool: ThreadPoolExecutor,
        ahead: int,
        earlier: IncompleteUpload | None = None,
    ) -> None:
        self.url, self._small = url, size <= SMALL_OBJECT_BYTES
        self._part, self._pool, self._ahead = part, pool, ahead
        self._buffer = bytearray()
        self._sent: dict[int, str] = {}
        self._in_flight: deque[Future[None]] = deque()
        self._address: dict[str, str] = {}
        self._earlier: dict[int, str] = {}
        self._complete_tried = self.closed = False
        if not self._small:
            self._open(earlier)

    def _open(self, earlier: IncompleteUpload | None) -> None:
        def call(store: Any) -> dict[str, str]:
            bucket, key, _ = store.split_path(self.url)
            address = {"Bucket": bucket, "Key": key}
            if earlier is not None:
                try:
                    self._earlier = _etags(store, bucket, earlier)
                    return address | {"UploadId": earlier.upload}
                except OSError as error:
                    if error_status(error)[0] != NO_SUCH_UPLOAD:
                        raise
            return address | {"UploadId": store.call_s3("create_multipart_upload", **address)["UploadId"]}

        self._address = with_retries(self.url, call, to="write")

    def write(self, data: bytes | bytearray) -> None:
        """Append `data`; sends every part that is full."""
        self._buffer += data
        while not self._small and len(self._buffer) >= self._part:
            self._send(bytes(memoryview(self._buffer)[: self._part]))
            del self._buffer[: self._part]

    def close(self) -> None:
        """Send the last part and wait until all parts are stored."""
        if self._small:
            return
        if self._buffer:
            self._send(bytes(self._buffer))
            self._buffer.clear()
        while self._in_flight:
            self._in_flight.popleft().result()

    def _send(self, data: bytes) -> None:
        while len(self._in_flight) >= self._ahead:
            self._in_flight.popleft().result()
        number = len(self._sent) + 1
        self._sent[number] = ""
        self._in_flight.append(self._pool.submit(self._put, number, data))

    def _put(self, number: int, data: bytes) -> None:
        known = self._earlier.get(number)
        if known is not None and hashlib.md5(data, usedforsecurity=False).hexdigest() == known.strip('"'):
            self._sent[number] = known
            return

        def call(store: Any) -> str:
            if self.closed:  # set between two attempts
                raise CancelledError
            try:
                answer = store.call_s3("upload_part", Body=data, PartNumber=number, **self._address)
            except OSError as error:
                self._raise_if_gone(error)
                raise
            return str(answer["ETag"])

        self._sent[number] = with_retries(self.url, call, to="write")

    def commit(self) -> None:
        """Make the object visible under its name."""
        with_retries(self.url, self._put_whole if self._small else self._complete, to="write")

    def _put_whole(self, store: Any) -> None:
        bucket, key, _ = store.split_path(self.url)
        store.call_s3("put_object", Bucket=bucket, Key=key, Body=bytes(self._buffer))

    def _complete(self, store: Any) -> None:
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in sorted(self._sent.items())]
        tried, self._complete_tried = self._complete_tried, True
        try:
            store.call_s3("complete_multipart_upload", MultipartUpload={"Parts": parts}, **self._address)
        except OSError as error:
            # An earlier attempt may have completed the upload while its answer was lost.
            if tried and error_status(error)[0] == NO_SUCH_UPLOAD and self._is_complete(store, len(parts)):
                return
            self._raise_if_gone(error)
            raise

    def _is_complete(self, store: Any, parts: int) -> bool:
        """True if the object exists with this number of parts: the ETag of a multipart object ends in their number."""
        head = store.call_s3("head_object", Bucket=self._address["Bucket"], Key=self._address["Key"])
        return str(head["ETag"]).strip('"').endswith(f"-{parts}")

    def _raise_if_gone(self, error: OSError) -> None:
        if error_status(error)[0] == NO_SUCH_UPLOAD:
            raise UserError(
                f"{self.url}: another process also writes this object or aborted its upload; let that process "
                "finish, then run this again"
            ) from error

    def discard(self) -> None:
        """Abort the upload. No part may be in flight, because a part that arrives after the abort would stay stored."""
        if self._address:
            abort(self.url, [IncompleteUpload(self._address["Key"], self._address["UploadId"])])
