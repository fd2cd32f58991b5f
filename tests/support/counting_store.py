"""An object store in this process whose responses a test writes down: errors, cut bodies, changed objects; no network.

Its URLs are `counting://BUCKET/KEY`. It answers the calls that `storage.object_store` makes to s3fs, with the errors of
s3fs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from fsspec.asyn import get_loop
from fsspec.spec import AbstractFileSystem

from data_pipeline.storage import object_store

PROTOCOL = "counting"
ROOT = f"{PROTOCOL}://bucket"
# What a request gets: None for a whole answer, bytes of the body before `error`, or an error in place of an answer.
Fault = tuple[int, Exception] | Exception | None


def refusal(code: str, status: int) -> Exception:
    """The error that s3fs raises for a response with this S3 code and HTTP status."""
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    answer = {"Error": {"Code": code, "Message": "said so"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(answer, "GetObject"))


@dataclass
class Objects:
    """Content of the store, what to answer, and what was asked.

    objects: key -> (content, ETag); faults: of the next requests, None afterwards
    requests: (key, first byte, If-Match) of every GET; served: (key, byte, length) of every piece of a body
    waits: seconds of every pause; size: bytes of a piece of a body; with_etag: responses have the ETag
    """

    objects: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    faults: Iterator[Fault] = field(default_factory=lambda: iter(()))
    requests: list[tuple[str, int, str | None]] = field(default_factory=list)
    served: list[tuple[str, int, int]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    size: int = 100
    with_etag: bool = True
    before_request: Callable[[], None] = lambda: None

    def put(self, key: str, content: bytes, etag: str = '"first"') -> str:
        self.objects[key] = content, etag
        return f"{ROOT}/{key}"

    def answer(self, key: str, byte_range: str | None, if_match: str | None) -> dict[str, Any]:
        self.before_request()
        numbers = list(map(int, re.findall(r"\d+", byte_range or "0")))
        first, last = numbers[0], numbers[1] if len(numbers) > 1 else 1 << 60
        self.requests.append((key, first, if_match))
        fault = next(self.faults, None)
        if isinstance(fault, Exception):
            raise fault
        if key not in self.objects:
            raise refusal("NoSuchKey", 404)
        content, etag = self.objects[key]
        if if_match not in (None, etag):
            raise refusal("PreconditionFailed", 412)
        if byte_range and (first >= len(content) or last < first):
            raise refusal("InvalidRange", 416)
        body = content[first : last + 1]
        answer = {"Body": Body(self, key, first, body, fault), "ContentLength": len(body)}
        if self.with_etag:
            answer["ETag"] = etag
        if byte_range:
            answer["ContentRange"] = f"bytes {first}-{first + len(body) - 1}/{len(content)}"
        return answer


@dataclass
class Body:
    """The body of a response, in pieces; raises the fault's error after its bytes."""

    store: Objects
    key: str
    position: int
    rest: bytes
    fault: tuple[int, Exception] | None

    async def read(self, _: int) -> bytes:
        piece = self.rest[: self.store.size]
        if self.fault is not None:
            piece = piece[: self.fault[0]]
            if not piece:
                raise self.fault[1]
            self.fault = self.fault[0] - len(piece), self.fault[1]
        if piece:
            self.store.served.append((self.key, self.position, len(piece)))
        self.rest, self.position = self.rest[len(piece) :], self.position + len(piece)
        return piece

    def close(self) -> None:
        self.rest = b""


class CountingFileSystem(AbstractFileSystem):
    """What `object_store` uses of s3fs."""

    protocol = PROTOCOL
    cachable = False
    content: Objects

    @property
    def loop(self) -> Any:
        return get_loop()

    def split_path(self, path: str) -> tuple[str, str, None]:
        bucket, _, key = path.removeprefix(f"{PROTOCOL}://").partition("/")
        return bucket, key, None

    async def _call_s3(self, method: str, **request: Any) -> dict[str, Any]:
        assert method == "get_object"
        return self.content.answer(request["Key"], request.get("Range"), request.get("IfMatch"))

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        answer = self.content.answer(self.split_path(path)[1], None, None)
        return {"name": path, "type": "file", "size": answer["ContentLength"], "ETag": answer["ETag"]}

    def size(self, path: str) -> int:
        return int(self.info(path)["size"])


@contextmanager
def counting_store() -> Iterator[Objects]:
    """Yield an empty store; pauses between tries take no time and are noted in `waits`."""
    content = Objects()
    fsspec.register_implementation(
        PROTOCOL, type("Counting", (CountingFileSystem,), {"content": content}), True
    )
    object_store.clear_filesystems()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DROMOS_READ_TRIES", "DROMOS_READ_BACKOFF", "DROMOS_READ_TIMEOUT"):
            patch.delenv(name, raising=False)
        patch.setattr(object_store, "time", SimpleNamespace(sleep=content.waits.append))
        yield content
    object_store.clear_filesystems()
