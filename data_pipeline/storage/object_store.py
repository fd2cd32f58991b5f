"""Object-store requests with retries and backoff.

An interrupted read resumes at the failed byte; every failure names its URL.
"""

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

RANGE_BYTES = 16 << 20  # largest range per request; a larger read is split into equal ranges
EXTRAS = {"s3": "dromos[s3]", "s3a": "dromos[s3]"}
# Packages whose errors mean that a request to an object store failed; few of these errors are OSErrors.
STORE_PACKAGES = {"aiobotocore", "aiohttp", "botocore", "fsspec", "http", "s3fs", "urllib3"}
# botocore's names for errors that no retry fixes -> advice.
CONFIGURATION_ADVICE = {
    **dict.fromkeys(
        ("NoCredentialsError", "PartialCredentialsError"),
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    ),
    "ProfileNotFound": "correct AWS_PROFILE",
    "NoRegionError": "set AWS_DEFAULT_REGION",
    "ParamValidationError": "correct the bucket's name",
}
# HTTP status and S3 error codes below 500 that are worth a retry.
RETRYABLE_STATUS = {408, 409, 429}
RETRYABLE_CODES = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded"}
CONNECTIONS = 32  # per process; botocore's default of 10 is less than the reads in flight of a prefetcher
CHUNK_BYTES = 1 << 20
MIN_BYTES_PER_SECOND = 64 << 10  # a slower connection counts as stalled
MAX_BACKOFF = 20.0  # seconds between two tries
Result = TypeVar("Result")


@dataclass
class Requests:
    """Counters of this process: GETs of objects (failed ones included), bytes received, failures."""

    gets: int = 0
    bytes: int = 0
    failures: int = 0


requests = Requests()  # module state on purpose: it describes the process, whoever sends the requests


@dataclass(frozen=True)
class RetryPolicy:
    """Number of tries and waiting times of a request.

    tries: attempts per read (DROMOS_READ_TRIES in the environment)
    backoff: seconds before the second try, doubled for each further one (DROMOS_READ_BACKOFF)
    timeout: seconds without data after which a connection is closed (DROMOS_READ_TIMEOUT)
    """

    tries: int = 10
    backoff: float = 0.25
    timeout: float = 30.0

    @classmethod
    def of_environment(cls) -> RetryPolicy:
        """Policy from the environment variables. Raises UserError if one is not a number, or allows no read."""
        try:
            policy = cls(
                int(os.environ.get("DROMOS_READ_TRIES", cls.tries)),
                float(os.environ.get("DROMOS_READ_BACKOFF", cls.backoff)),
                float(os.environ.get("DROMOS_READ_TIMEOUT", cls.timeout)),
            )
        except ValueError as error:
            raise UserError(
                f"DROMOS_READ_TRIES, DROMOS_READ_BACKOFF and DROMOS_READ_TIMEOUT must be numbers: {error}"
            ) from None
        if not (policy.tries >= 1 and policy.backoff >= 0 and policy.timeout > 0):  # false for NaN too
            raise UserError(
                f"DROMOS_READ_TRIES is {policy.tries}, DROMOS_READ_BACKOFF {policy.backoff} and DROMOS_READ_TIMEOUT "
                f"{policy.timeout}; they must be at least 1, at least 0 and above 0"
            )
        return policy

    def wait(self, failures: int) -> None:
        """Sleep before the next try, with random jitter, so that a thousand readers do not retry at the same time."""
        time.sleep(random.uniform(0.5, 1.0) * min(MAX_BACKOFF, self.backoff * 2 ** (failures - 1)))


@lru_cache(maxsize=16)
def _filesystem(protocol: str, process: int, reading: bool) -> Any:
    """fsspec file system, one per protocol, process and use. Per process: its event loop does not survive a fork."""
    import fsspec

    policy = RetryPolicy.of_environment()
    options: dict[str, Any] = {}
    if reading and protocol in EXTRAS:
        # One attempt per call: retries of botocore and of s3fs would be invisible here and multiply with ours.
        options["config_kwargs"] = {
            "retries": {"total_max_attempts": 1},
            "read_timeout": policy.timeout,
            "connect_timeout": min(policy.timeout, 10.0),
            "max_pool_connections": CONNECTIONS,
        }
        options |= {"skip_instance_cache": True, "use_listings_cache": False}
    try:
        store = fsspec.filesystem(protocol, **options)
    except (ImportError, ValueError) as error:
        extra = EXTRAS.get(protocol)
        hint = f"install it with: pip install '{extra}'" if extra else "write a local path or s3://"
        raise UserError(f"{protocol}:// needs a package that is not installed ({error}); {hint}") from None
    if reading and protocol in EXTRAS:
        store.retries = 1
    return store


def filesystem(url: str) -> Any:
    """fsspec file system for writing and opening; credentials and endpoint come from the AWS environment variables."""
    return _filesystem(url.split("://", 1)[0], os.getpid(), False)


def _reader(url: str) -> Any:
    return _filesystem(url.split("://", 1)[0], os.getpid(), True)


def clear_filesystems() -> None:
    """Drop the cached file systems, so that the next call reads the environment variables again."""
    _filesystem.cache_clear()


@contextmanager
def store_errors(url: str) -> Iterator[None]:
    """Around store calls: turn outages into ReadErrors that name the URL, wrong configuration into UserErrors."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        if not _is_store_error(error):
            raise
        advice = CONFIGURATION_ADVICE.get(type(error).__name__)
        if advice is not None:
            raise UserError(f"{url}: {_describe_error(error)}; {advice}") from None
        raise ReadError(f"{url} could not be read: {_describe_error(error)}") from error


def with_retries(url: str, call: Callable[[Any], Result], *, to: str = "read") -> Result:
    """Return call(file system), retried after server errors and timeouts.

    to: "read" or "write", for messages; a write must be idempotent.
    Raises FileNotFoundError, UserError if the request is refused or misconfigured, ReadError after the last try.
    """
    policy = RetryPolicy.of_environment()
    for tries in range(1, policy.tries + 1):
        try:
            with store_errors(url), activity.reading(url):
                return call(_reader(url))
        except OSError as error:
            _raise_if_final(url, error, to)
            requests.failures += 1
            if tries == policy.tries:
                done = "read" if to == "read" else "written"
                raise ReadError(
                    f"{url} could not be {done} after {tries} tries: {_describe_error(error)}"
                ) from error
            policy.wait(tries)
    raise AssertionError("unreachable")


@dataclass
class _PartialRead:
    """Bytes [start, stop) of an object, received so far in `data`; stop None means to its end."""

    url: str
    start: int
    stop: int | None
    size: int | None  # of the object, None until it is known
    etag: str | None = None
    version: int = 0  # required `version_of` its ETag; 0 accepts any
    data: bytearray = field(default_factory=bytearray)

    @property
    def position(self) -> int:
        """The next byte to request."""
        return self.start + len(self.data)

    @property
    def is_complete(self) -> bool:
        """True if bytes were received and none is missing."""
        ends = [end for end in (self.stop, self.size) if end is not None]
        return bool(self.data) and self.size is not None and self.position >= min(ends)


def version_of(etag: str) -> int:
    """Hash of an object's ETag, which changes with its content; never 0."""
    return xxhash.xxh64_intdigest(etag.encode()) or 1


def read(
    url: str, start: int = 0, stop: int | None = None, size: int | None = None, version: int = 0
) -> bytes:
    """Bytes [start, stop) of an object, the whole object by default; fewer if it ends before `stop`.

    Raises as `with_retries` does, and UserError if the object does not match `size` or `version`, or if it changes
    between two requests.
    """
    if stop is None:
        return bytes(_read_with_retries(_PartialRead(url, start, None, size, version=version)).data)
    requests_needed = max(1, -(-(stop - start) // RANGE_BYTES))
    cuts = [start + (stop - start) * i // requests_needed for i in range(requests_needed + 1)]
    parts: list[bytes] = []
    etag = None
    for low, high in itertools.pairwise(cuts):
        partial = _read_with_retries(_PartialRead(url, low, high, size, etag, version))
        size, etag = partial.size, partial.etag
        parts.append(bytes(partial.data))
        if len(partial.data) < high - low:
            break
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _read_with_retries(partial: _PartialRead) -> _PartialRead:
    policy = RetryPolicy.of_environment()
    for tries in range(1, policy.tries + 1):
        try:
            with store_errors(partial.url), activity.reading(partial.url):
                _read_remaining(partial, policy)
            return partial
        except OSError as error:
            _raise_if_final(partial.url, error)
            requests.failures += 1
            # The connection failed after the last byte. Another try would ask for no bytes, which stores refuse.
            if partial.is_complete:
                return partial
            if tries == policy.tries:
                raise ReadError(
                    f"{partial.url} could not be read: stopped at byte {partial.position} after {tries} tries: "
                    f"{_describe_error(error)}"
                ) from error
            policy.wait(tries)
    raise AssertionError("unreachable")


def _read_remaining(partial: _PartialRead, policy: RetryPolicy) -> None:
    """Request the bytes that `partial` still lacks."""
    store = _reader(partial.url)
    if not hasattr(store, "_call_s3"):
        requests.gets += 1
        data = store.cat_file(partial.url, start=partial.position, end=partial.stop)
        partial.data += data
        requests.bytes += len(data)
        return
    from fsspec.asyn import sync

    missing = RANGE_BYTES if partial.stop is None else partial.stop - partial.position
    # A connection that delivers a byte now and then never reaches the read timeout, so the whole GET gets one too.
    timeout = 2 * policy.timeout + missing / MIN_BYTES_PER_SECOND if partial.stop is not None else None
    sync(store.loop, _get, store, partial, timeout)


async def _get(store: Any, partial: _PartialRead, timeout: float | None) -> None:
    async with asyncio.timeout(timeout):
        bucket, key, _ = store.split_path(partial.url)
        request = {"Bucket": bucket, "Key": key}
        if partial.position or partial.stop is not None:
            request["Range"] = f"bytes={partial.position}-{'' if partial.stop is None else partial.stop - 1}"
        if partial.etag:
            request["IfMatch"] = partial.etag
        requests.gets += 1
        response = await store._call_s3("get_object", **request)
        body = response["Body"]
        try:
            _check_response(partial, response)
            while chunk := await body.read(CHUNK_BYTES):
                partial.data += chunk
                requests.bytes += len(chunk)
        finally:
            body.close()


def _check_response(partial: _PartialRead, response: dict[str, Any]) -> None:
    """Raise unless the response is the expected object, from the right byte on; record its size and ETag."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.get("ContentRange") or "")
    if match is None and (partial.position or partial.stop is not None):
        raise UserError(
            f"{partial.url}: the store does not support range requests; copy the data to one that does"
        )
    first, size = (int(match[1]), int(match[2])) if match else (0, int(response["ContentLength"]))
    if first != partial.position:
        raise ReadError(
            f"{partial.url}: requested bytes from {partial.position}, received bytes from {first}"
        )
    if partial.size is not None and size != partial.size:
        raise changed_error(partial.url, f"it has {size} bytes now, {partial.size} before")
    if partial.version and "ETag" in response and version_of(str(response["ETag"])) != partial.version:
        raise changed_error(
            partial.url, f"its ETag is {response['ETag']} now, different from when the source was opened"
        )
    partial.size, partial.etag = size, response.get("ETag") or partial.etag


def changed_error(url: str, how: str) -> UserError:
    """UserError for an object that is not the one whose samples were counted."""
    return UserError(
        f"{url} was changed: {how}; restore the old content, or run: dromos data index {url.rpartition('/')[0]}"
    )


def _raise_if_final(url: str, error: OSError, to: str = "read") -> None:
    """Raise if no retry can help: FileNotFoundError as it is, other client errors as UserErrors with advice."""
    if isinstance(error, FileNotFoundError):
        raise error
    code, status = error_status(error)
    if isinstance(error, PermissionError) or status in (401, 403):
        raise UserError(
            f"permission denied {'reading' if to == 'read' else 'writing'} {url} "
            f"({code or status or 'refused'}: {error}); grant {to} access to the credentials in use, or use others"
        ) from error
    if status == 412:
        raise changed_error(url, "its content changed during the read") from error
    if status == 416:
        raise changed_error(url, "it ends before the requested bytes") from error
    if 300 <= status < 500 and status not in RETRYABLE_STATUS and code not in RETRYABLE_CODES:
        raise UserError(
            f"the store refused the request for {url} ({code or status}: {error}); correct its name or the endpoint"
        ) from error


def error_status(error: BaseException) -> tuple[str, int]:
    """S3's code and HTTP status of a failure; ("", 0) if the store sent no response."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None)
    if not isinstance(response, dict):
        return "", 0
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return str(response.get("Error", {}).get("Code", "")), int(status)


def _is_store_error(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in STORE_PACKAGES


def _describe_error(error: BaseException) -> str:
    """One line about an error; for a ReadError, about the store's error that caused it."""
    if isinstance(error, ReadError) and error.__cause__ is not None:
        error = error.__cause__
    code, status = error_status(error)
    prefix = ""
    if status:
        prefix = f"{status}, " if code == str(status) else f"{status} {code}, "
    return f"{prefix}{type(error).__name__}: {' '.join(str(error).split()) or 'no response in time'}"
