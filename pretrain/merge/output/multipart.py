"""One object of S3 on its way: parts sent side by side in a bounded memory, seen by nobody before the end.

What a killed process sent is found again by its ETags: a part whose MD5 the store already has is not sent twice.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.storage.object_store import error_status, filesystem, with_retries

SMALL = 1 << 20
"""Bytes of the largest object that is kept and put whole at the end."""

GONE = "NoSuchUpload"


@dataclass
class Begun:
    """An upload that is not complete. etags: number of a part -> ETag, which is the MD5 unless the store encrypts."""

    key: str
    upload: str
    etags: dict[int, str] = field(default_factory=dict)


def begun_in(folder: str) -> list[Begun]:
    """Uploads directly in a folder, begun and neither completed nor aborted; none where they may not be listed.

    What lies deeper is others': a merge neither goes on with it nor takes it back.
    """
    try:
        return with_retries(folder, lambda store: list(_begun(store, folder)))
    except UserError:
        return []


def abort(folder: str, uploads: list[Begun]) -> None:
    """Take back what they hold; what cannot be reached now is left to the rules of the bucket."""
    if not uploads:
        return
    store = filesystem(folder)
    bucket = store.split_path(folder)[0]
    for one in uploads:
        with suppress(Exception):  # the store may be what failed; the error that led here is the one to tell
            store.call_s3("abort_multipart_upload", Bucket=bucket, Key=one.key, UploadId=one.upload)


def _begun(store: Any, folder: str) -> Iterator[Begun]:
    bucket, key, _ = store.split_path(folder)
    page: dict[str, Any] = {}
    while True:
        found = store.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/", **page)
        for entry in found.get("Uploads", []):
            if "/" in entry["Key"][len(key) + 1 :]:
                continue
            yield Begun(entry["Key"], entry["UploadId"])
        if not found.get("IsTruncated"):
            return
        page = {"KeyMarker": found["NextKeyMarker"], "UploadIdMarker": found["NextUploadIdMarker"]}


def _etags(store: Any, bucket: str, begun: Begun) -> dict[int, str]:
    etags: dict[int, str] = {}
    page: dict[str, Any] = {}
    while True:
        found = store.call_s3("list_parts", Bucket=bucket, Key=begun.key, UploadId=begun.upload, **page)
        etags |= {part["PartNumber"]: part["ETag"] for part in found.get("Parts", [])}
        if not found.get("IsTruncated"):
            return etags
        page = {"PartNumberMarker": found["NextPartNumberMarker"]}


class Multipart:
    """An object of `size` bytes, written from its start to its end in parts of `part` bytes, `ahead` of them at once.

    earlier: an upload of this object that a killed process left; its parts are used where they are the same.
    closed: set from outside: nothing more is to be sent.
    Methods raise UserError for what is refused, FileNotFoundError without the bucket, ReadError when the store stays
    away.
    """

    def __init__(
        self,
        url: str,
        size: int,
        part: int,
        pool: ThreadPoolExecutor,
        ahead: int,
        earlier: Begun | None = None,
    ) -> None:
        self.url, self._small, self._part, self._pool, self._ahead = url, size <= SMALL, part, pool, ahead
        self._buffer = bytearray()
        self._sent: dict[int, str] = {}
        self._on_way: deque[Future[None]] = deque()
        self._place: dict[str, str] = {}
        self._earlier: dict[int, str] = {}
        self._tried = self.closed = False
        if not self._small:
            self._open(earlier)

    def _open(self, earlier: Begun | None) -> None:
        def call(store: Any) -> dict[str, str]:
            bucket, key, _ = store.split_path(self.url)
            place = {"Bucket": bucket, "Key": key}
            if earlier is not None:
                try:
                    self._earlier = _etags(store, bucket, earlier)
                    return place | {"UploadId": earlier.upload}
                except OSError as error:
                    if error_status(error)[0] != GONE:
                        raise
            return place | {"UploadId": store.call_s3("create_multipart_upload", **place)["UploadId"]}

        self._place = with_retries(self.url, call, to="write")

    def write(self, data: bytes | bytearray) -> None:
        self._buffer += data
        while not self._small and len(self._buffer) >= self._part:
            self._send(bytes(memoryview(self._buffer)[: self._part]))
            del self._buffer[: self._part]

    def close(self) -> None:
        """Send what is left, and wait for it."""
        if self._small:
            return
        if self._buffer:
            self._send(bytes(self._buffer))
            self._buffer.clear()
        while self._on_way:
            self._on_way.popleft().result()

    def _send(self, data: bytes) -> None:
        while len(self._on_way) >= self._ahead:
            self._on_way.popleft().result()
        number = len(self._sent) + 1
        self._sent[number] = ""
        self._on_way.append(self._pool.submit(self._put, number, data))

    def _put(self, number: int, data: bytes) -> None:
        known = self._earlier.get(number)
        if known is not None and hashlib.md5(data, usedforsecurity=False).hexdigest() == known.strip('"'):
            self._sent[number] = known
            return

        def call(store: Any) -> str:
            if self.closed:  # between two tries
                raise CancelledError
            try:
                answer = store.call_s3("upload_part", Body=data, PartNumber=number, **self._place)
            except OSError as error:
                self._raise_if_taken(error)
                raise
            return str(answer["ETag"])

        self._sent[number] = with_retries(self.url, call, to="write")

    def commit(self) -> None:
        """The object appears under its name, whole."""
        with_retries(self.url, self._put_whole if self._small else self._complete, to="write")

    def _put_whole(self, store: Any) -> None:
        bucket, key, _ = store.split_path(self.url)
        store.call_s3("put_object", Bucket=bucket, Key=key, Body=bytes(self._buffer))

    def _complete(self, store: Any) -> None:
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in sorted(self._sent.items())]
        tried, self._tried = self._tried, True
        try:
            store.call_s3("complete_multipart_upload", MultipartUpload={"Parts": parts}, **self._place)
        except OSError as error:
            # What was done, and whose answer got lost, need not be done again.
            if tried and error_status(error)[0] == GONE and self._stands(store, len(parts)):
                return
            self._raise_if_taken(error)
            raise

    def _stands(self, store: Any, parts: int) -> bool:
        found = store.call_s3("head_object", Bucket=self._place["Bucket"], Key=self._place["Key"])
        return str(found["ETag"]).strip('"').endswith(f"-{parts}")

    def _raise_if_taken(self, error: OSError) -> None:
        if error_status(error)[0] == GONE:
            raise UserError(
                f"{self.url}: another process writes it too, or took back what was sent; let one finish, and run this "
                "again"
            ) from error

    def discard(self) -> None:
        """Nothing of it stays. Nothing of it may be on its way: a part that comes later would stay."""
        if self._place:
            abort(self.url, [Begun(self._place["Key"], self._place["UploadId"])])
