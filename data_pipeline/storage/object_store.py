"""Object stores asked with patience: a read that breaks off goes on where it did, and what cannot be had is named."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import xxhash

from data_pipeline import activity
from data_pipeline.errors import ReadError, UserError

RANGE_BYTES = 16 << 20
"""Bytes of the largest range asked for at once; what is larger is asked for in pieces of half of it to all of it."""

EXTRAS = {"s3": "dromos[s3]", "s3a": "dromos[s3]"}
# Packages whose errors say that an object store could not be asked; few of them are OSErrors.
STORE_PACKAGES = {"aiobotocore", "aiohttp", "botocore", "fsspec", "http", "s3fs", "urllib3"}
# botocore's names for what waiting does not mend -> what does.
SETTINGS = {
    **dict.fromkeys(
        ("NoCredentialsError", "PartialCredentialsError"),
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    ),
    "ProfileNotFound": "correct AWS_PROFILE",
    "NoRegionError": "set AWS_DEFAULT_REGION",
    "ParamValidationError": "correct the bucket's name",
}
# Answers of S3 below 500 that another try may mend.
BUSY = {408, 409, 429}
BUSY_CODES = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded"}
CONNECTIONS = 32  # botocore keeps 10, fewer than the reads that prefetching has under way
CHUNK = 1 << 20
SLOWEST = 64 << 10  # bytes a second below which a connection counts as stalled
LONGEST = 20.0  # seconds between two tries
Result = TypeVar("Result")


@dataclass
class Requests:
    """What this process has asked object stores for: GETs of objects, also those that failed, and their bytes."""

    gets: int = 0
    bytes: int = 0
    failures: int = 0


requests = Requests()


@dataclass(frozen=True)
class RetryPolicy:
    """How long a store is waited for: `tries` of each read, seconds before the second one, doubled for every other,
    and seconds of silence after which a connection is given up. The environment's DROMOS_READ_TRIES,
    DROMOS_READ_BACKOFF and DROMOS_READ_TIMEOUT set them."""

    tries: int = 10
    backoff: float = 0.25
    timeout: float = 30.0

    @classmethod
    def of_environment(cls) -> RetryPolicy:
        try:
            return cls(
                int(os.environ.get("DROMOS_READ_TRIES", cls.tries)),
                float(os.environ.get("DROMOS_READ_BACKOFF", cls.backoff)),
                float(os.environ.get("DROMOS_READ_TIMEOUT", cls.timeout)),
            )
        except ValueError as error:
            raise UserError(
                f"DROMOS_READ_TRIES, DROMOS_READ_BACKOFF and DROMOS_READ_TIMEOUT are numbers: {error}"
            ) from None

    def wait(self, failures: int) -> None:
        """Sleep before the next try; at random, so that a thousand readers do not come back at once."""
        time.sleep(random.uniform(0.5, 1.0) * min(LONGEST, self.backoff * 2 ** (failures - 1)))


@lru_cache(maxsize=16)
def _filesystem(protocol: str, process: int, reading: bool) -> Any:
    """One fsspec file system a protocol, process and use: its event loop does not survive a fork."""
    import fsspec

    patience = RetryPolicy.of_environment()
    options: dict[str, Any] = {}
    if reading and protocol in EXTRAS:
        # botocore and s3fs would each try again by themselves, unseen, and the tries would multiply.
        options["config_kwargs"] = {
            "retries": {"total_max_attempts": 1},
            "read_timeout": patience.timeout,
            "connect_timeout": min(patience.timeout, 10.0),
            "max_pool_connections": CONNECTIONS,
        }
        options |= {"skip_instance_cache": True, "use_listings_cache": False}
    try:
        store = fsspec.filesystem(protocol, **options)
    except (ImportError, ValueError) as error:
        extra = EXTRAS.get(protocol)
        hint = f"install it with: pip install '{extra}'" if extra else "write a local path or s3://"
        raise UserError(f"{protocol}:// needs a package that is not there ({error}); {hint}") from None
    if reading and protocol in EXTRAS:
        store.retries = 1
    return store


def filesystem(url: str) -> Any:
    """The fsspec file system to write and open with; keys and endpoint come from the environment, as AWS has it."""
    return _filesystem(url.split("://", 1)[0], os.getpid(), False)


def _reader(url: str) -> Any:
    return _filesystem(url.split("://", 1)[0], os.getpid(), True)


def forget() -> None:
    """Open file systems anew: the environment that they were made from has changed."""
    _filesystem.cache_clear()


@contextmanager
def store_errors(url: str) -> Iterator[None]:
    """Around calls to an object store: its outages become ReadErrors that name the url, missing keys UserErrors."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        if not _of_store(error):
            raise
        if type(error).__name__ in SETTINGS:
            raise UserError(f"{url}: {_describe_error(error)}; {SETTINGS[type(error).__name__]}") from None
        raise ReadError(f"{url} cannot be had: {_describe_error(error)}") from error


def with_retries(url: str, call: Callable[[Any], Result], *, to: str = "read") -> Result:
    """call(file system), tried again while the store is at fault.

    to: read or write, for messages. What is written twice must be as if it had been written once.
    Raises FileNotFoundError, UserError for what is refused or set wrong, ReadError when the tries are used up.
    """
    patience = RetryPolicy.of_environment()
    for tries in range(1, patience.tries + 1):
        try:
            with store_errors(url), activity.reading(url):
                return call(_reader(url))
        except OSError as error:
            _raise_if_final(url, error, to)
            requests.failures += 1
            if tries == patience.tries:
                done = "had" if to == "read" else "written"
                raise ReadError(
                    f"{url} cannot be {done} after {tries} tries: {_describe_error(error)}"
                ) from error
            patience.wait(tries)
    raise AssertionError("unreachable")


@dataclass
class _Part:
    """Bytes [start, stop) of an object, on their way; stop None: to its end."""

    url: str
    start: int
    stop: int | None
    size: int | None  # of the object, once it is known
    etag: str | None = None
    version: int = 0  # what `version_of` its ETag must be, 0 if that is not known
    data: bytearray = field(default_factory=bytearray)

    @property
    def at(self) -> int:
        return self.start + len(self.data)


def version_of(etag: str) -> int:
    """A hash of an object's ETag, which changes with its content; never 0."""
    return xxhash.xxh64_intdigest(etag.encode()) or 1


def read(
    url: str, start: int = 0, stop: int | None = None, size: int | None = None, version: int = 0
) -> bytes:
    """Bytes [start, stop) of an object, all of it by default; fewer where it ends before `stop`.

    `size` and `version`, where they are given, are what the object's must be. Raises like `ask`; a UserError too if
    the object is not what it was, or changes between two pieces.
    """
    if stop is None:
        return bytes(_complete(_Part(url, start, None, size, version=version)).data)
    pieces = max(1, -(-(stop - start) // RANGE_BYTES))
    cuts = [start + (stop - start) * i // pieces for i in range(pieces + 1)]
    parts: list[bytes] = []
    etag = None
    for low, high in itertools.pairwise(cuts):
        part = _complete(_Part(url, low, high, size, etag, version))
        size, etag = part.size, part.etag
        parts.append(bytes(part.data))
        if len(part.data) < high - low:
            break
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _complete(part: _Part) -> _Part:
    patience = RetryPolicy.of_environment()
    for tries in range(1, patience.tries + 1):
        try:
            with store_errors(part.url), activity.reading(part.url):
                _read_remaining(part, patience)
            return part
        except OSError as error:
            _raise_if_final(part.url, error)
            requests.failures += 1
            if tries == patience.tries:
                raise ReadError(
                    f"{part.url} cannot be had: at byte {part.at} after {tries} tries: {_describe_error(error)}"
                ) from error
            patience.wait(tries)
    raise AssertionError("unreachable")


def _read_remaining(part: _Part, patience: RetryPolicy) -> None:
    """Ask for what is still missing of `part`."""
    store = _reader(part.url)
    if not hasattr(store, "_call_s3"):
        requests.gets += 1
        part.data += store.cat_file(part.url, start=part.at, end=part.stop)
        requests.bytes += len(part.data)
        return
    from fsspec.asyn import sync

    missing = RANGE_BYTES if part.stop is None else part.stop - part.at
    # A connection that gives a byte now and then never times out by itself.
    longest = 2 * patience.timeout + missing / SLOWEST if part.stop is not None else None
    sync(store.loop, _get, store, part, longest)


async def _get(store: Any, part: _Part, longest: float | None) -> None:
    async with asyncio.timeout(longest):
        bucket, key, _ = store.split_path(part.url)
        wanted = {"Bucket": bucket, "Key": key}
        if part.at or part.stop is not None:
            wanted["Range"] = f"bytes={part.at}-{'' if part.stop is None else part.stop - 1}"
        if part.etag:
            wanted["IfMatch"] = part.etag
        requests.gets += 1
        answer = await store._call_s3("get_object", **wanted)
        body = answer["Body"]
        try:
            _check(part, answer)
            while chunk := await body.read(CHUNK):
                part.data += chunk
                requests.bytes += len(chunk)
        finally:
            body.close()


def _check(part: _Part, answer: dict[str, Any]) -> None:
    """Is this the object that was asked for, from the right byte on?"""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.get("ContentRange") or "")
    if found is None and (part.at or part.stop is not None):
        raise UserError(f"{part.url}: the store does not answer ranges; copy the data to one that does")
    first, size = (int(found[1]), int(found[2])) if found else (0, int(answer["ContentLength"]))
    if first != part.at:
        raise ReadError(f"{part.url}: asked for bytes from {part.at}, got them from {first}")
    if part.size is not None and size != part.size:
        raise changed(part.url, f"{size} bytes, it had {part.size}")
    if part.version and "ETag" in answer and version_of(str(answer["ETag"])) != part.version:
        raise changed(part.url, f"its ETag is {answer['ETag']}, it was another when the source was opened")
    part.size, part.etag = size, answer.get("ETag") or part.etag


def changed(url: str, how: str) -> UserError:
    """The error for an object that is not the one whose samples were counted."""
    return UserError(
        f"{url} was changed: {how}; put back what was there, or run: dromos data index {url.rpartition('/')[0]}"
    )


def _raise_if_final(url: str, error: OSError, to: str = "read") -> None:
    """Raise what no other try can mend, in words."""
    if isinstance(error, FileNotFoundError):
        raise error
    code, status = answer_of(error)
    if isinstance(error, PermissionError) or status in (401, 403):
        raise UserError(
            f"{url} may not be {'read' if to == 'read' else 'written'} ({code or status or 'refused'}: {error}); give "
            f"the credentials in use the right to {to} it, or use others"
        ) from error
    if status == 412:
        raise changed(url, "its content is not what it was a moment ago") from error
    if status == 416:
        raise changed(url, "it ends before the bytes that were asked for") from error
    if 300 <= status < 500 and status not in BUSY and code not in BUSY_CODES:
        raise UserError(
            f"{url} is refused ({code or status}: {error}); correct its name or the endpoint"
        ) from error


def answer_of(error: BaseException) -> tuple[str, int]:
    """S3's code and HTTP status of a failure; ("", 0) where the store did not answer."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    if not isinstance(response, dict):
        return "", 0
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return str(response.get("Error", {}).get("Code", "")), int(status)


def _of_store(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in STORE_PACKAGES


def _describe_error(error: BaseException) -> str:
    """An error in words: the store's own where it stands behind ours."""
    if isinstance(error, ReadError) and error.__cause__ is not None:
        error = error.__cause__
    code, status = answer_of(error)
    answered = ""
    if status:
        answered = f"{status}, " if code == str(status) else f"{status} {code}, "
    return f"{answered}{type(error).__name__}: {' '.join(str(error).split()) or 'no answer in time'}"
