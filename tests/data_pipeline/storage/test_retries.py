"""Retries of reads from a store: which errors, how often, with which pauses, from which byte, at one level only."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import botocore.exceptions as boto
import numpy as np
import pytest

from data_pipeline import storage
from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import SourceSpec, StreamSpec
from data_pipeline.errors import ReadError, UserError
from data_pipeline.sources.manifest import Manifest
from data_pipeline.storage import object_store
from data_pipeline.storage.cache import ByteRange, Cache, CacheSettings
from data_pipeline.storage.cached_ranges import fetch, read_chunks
from data_pipeline.storage.object_store import RetryPolicy, version_of
from data_pipeline.transforms.text_formats import PackedFormat
from tests.support.counting_store import ROOT, Body, Fault, Objects, counting_store, refusal
from tests.support.samples import LENGTH, write_packed

DATA = random.Random(1).randbytes(3000)
RESET = ConnectionResetError("reset by peer")


@pytest.fixture
def store() -> Iterator[Objects]:
    with counting_store() as content:
        content.put("a.bin", DATA)
        yield content


PASSING: list[Exception] = [
    refusal("SlowDown", 503),
    refusal("InternalError", 500),
    refusal("BadGateway", 502),
    refusal("GatewayTimeout", 504),
    refusal("RequestTimeout", 400),
    refusal("Throttling", 400),
    refusal("OperationAborted", 409),
    refusal("TooManyRequests", 429),
    RESET,
    BrokenPipeError("broken"),
    TimeoutError(),
    OSError("no answer"),
    http.client.IncompleteRead(b"half"),
    http.client.RemoteDisconnected("closed"),
    aiohttp.ClientPayloadError("payload is not completed"),
    aiohttp.ServerDisconnectedError(),
    boto.ReadTimeoutError(endpoint_url="x"),
    boto.ConnectTimeoutError(endpoint_url="x"),
    boto.EndpointConnectionError(endpoint_url="x"),
    boto.IncompleteReadError(actual_bytes=1, expected_bytes=2),
    boto.ResponseStreamingError(error="cut"),
]
# (error, what is raised for it, its message)
FINAL: list[tuple[Exception, type[Exception], str]] = [
    (refusal("NoSuchKey", 404), UserError, r"a\.bin is gone"),
    (refusal("NoSuchBucket", 404), UserError, r"a\.bin is gone"),
    (refusal("AccessDenied", 403), UserError, "permission denied reading .*AccessDenied.*credentials"),
    (refusal("ExpiredToken", 400), UserError, "permission denied reading .*ExpiredToken"),
    (refusal("InvalidAccessKeyId", 403), UserError, "permission denied"),
    (refusal("Unauthorized", 401), UserError, "permission denied"),
    (refusal("PreconditionFailed", 412), UserError, "was changed: its content changed during the read"),
    (refusal("InvalidRange", 416), UserError, "was changed: it ends before the requested bytes"),
    (refusal("PermanentRedirect", 301), UserError, "refused the request .*PermanentRedirect.*endpoint"),
    (refusal("InvalidRequest", 400), UserError, "refused the request"),
    (boto.NoCredentialsError(), UserError, "set AWS_ACCESS_KEY_ID"),
    (boto.ProfileNotFound(profile="x"), UserError, "correct AWS_PROFILE"),
    (boto.NoRegionError(), UserError, "AWS_DEFAULT_REGION"),
    (ZeroDivisionError("a mistake of ours"), ZeroDivisionError, "a mistake"),
    (KeyError("ContentLength"), KeyError, "ContentLength"),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_may_pass_is_tried_as_often_as_the_setting_says(
    store: Objects, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setenv("DROMOS_READ_TRIES", "4")
    url = f"{ROOT}/a.bin"
    store.faults = iter([error] * 3)
    assert storage.read_range(url, 10, 500) == DATA[10:510]
    assert len(store.requests) == 4
    assert len(store.waits) == 3
    store.faults = itertools.repeat(error)
    for call in (lambda: storage.read_range(url, 10, 500), lambda: storage.size(url)):
        store.requests.clear()
        store.waits.clear()
        with pytest.raises(ReadError, match=rf"{url} could not be read.* after 4 tries: .*"):
            call()
        assert len(store.requests) == 4
        assert len(store.waits) == 3  # none after the last try


@pytest.mark.parametrize(("error", "kind", "message"), FINAL, ids=lambda value: repr(value)[:60])
def test_what_stays_wrong_is_tried_once(
    store: Objects, error: Exception, kind: type[Exception], message: str
) -> None:
    store.faults = itertools.repeat(error)
    with pytest.raises(kind, match=message):
        storage.read_range(f"{ROOT}/a.bin", 10, 500)
    assert len(store.requests) == 1
    assert store.waits == []


def test_a_final_error_ends_the_tries_of_a_passing_one(store: Objects) -> None:
    store.faults = iter([RESET, refusal("SlowDown", 503), refusal("AccessDenied", 403)])
    with pytest.raises(UserError, match="permission denied"):
        storage.read_range(f"{ROOT}/a.bin", 10, 500)
    assert len(store.requests) == 3


def test_pauses_double_up_to_their_limit_and_differ_by_chance(
    store: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.25 s, 0.5 s, ... 20 s, each times a random factor of 0.5 to 1: 75 to 150 s in all, then an error."""
    runs = []
    for _ in range(40):
        store.waits.clear()
        store.faults = itertools.repeat(RESET)
        with pytest.raises(ReadError, match="after 10 tries"):
            storage.read_bytes(f"{ROOT}/a.bin")
        runs.append(list(store.waits))
    whole = [0.25, 0.5, 1, 2, 4, 8, 16, 20, 20]
    factors = np.array(runs) / whole
    assert ((factors >= 0.5) & (factors <= 1)).all()
    assert (factors.min(axis=0) < 0.65).all()
    assert (factors.max(axis=0) > 0.85).all()
    assert np.abs(np.corrcoef(factors.T) - np.eye(9)).max() < 0.7  # each pause has a factor of its own
    monkeypatch.setenv("DROMOS_READ_BACKOFF", "7")
    store.waits.clear()
    with pytest.raises(ReadError):
        storage.size(f"{ROOT}/a.bin")
    assert all(0.5 * most <= wait <= most for wait, most in zip(store.waits, [7, 14, *[20] * 7], strict=True))


def test_after_a_success_tries_and_pauses_count_anew(store: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five pieces of one read, each after two failures: with three tries, none is the last."""
    monkeypatch.setenv("DROMOS_READ_TRIES", "3")
    monkeypatch.setattr(object_store, "RANGE_BYTES", 600)
    store.faults = itertools.cycle([RESET, refusal("SlowDown", 503), None])
    failures = object_store.requests.failures
    assert storage.read_range(f"{ROOT}/a.bin", 0, 3000) == DATA
    assert [first for _, first, _ in store.requests] == [at for at in range(0, 3000, 600) for _ in range(3)]
    assert all(wait <= most for wait, most in zip(store.waits, [0.25, 0.5] * 5, strict=True))
    assert object_store.requests.failures - failures == 10


@pytest.mark.parametrize("whole", [False, True])
def test_an_interrupted_body_goes_on_at_its_byte(
    store: Objects, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """Bodies cut anywhere, also before the first byte and behind the last: no byte is sent twice, none is left out."""
    monkeypatch.setenv("DROMOS_READ_TRIES", "50")
    chance = random.Random(2)
    for _ in range(150):
        store.size = chance.randrange(1, 900)
        start, stop = (0, 3000) if whole else sorted(chance.sample(range(3001), 2))
        cuts: list[Fault] = [(chance.choice([0, 1, 7, 800, 3000]), chance.choice(PASSING)) for _ in range(6)]
        cuts[chance.randrange(6)] = (stop - start, RESET)
        store.faults = iter([*cuts, chance.choice(PASSING)])
        store.served.clear()
        store.requests.clear()
        url, received = f"{ROOT}/a.bin", object_store.requests.bytes
        data = storage.read_bytes(url) if whole else storage.read_range(url, start, stop - start)
        assert data == DATA[start:stop]
        ends = [at + length for _, at, length in store.served]
        assert [start, *ends[:-1]] == [at for _, at, _ in store.served]
        assert ends[-1] == stop
        assert object_store.requests.bytes - received == stop - start
        assert {first for _, first, _ in store.requests} <= {start, *ends}


def test_only_the_object_of_the_first_response_is_read_on(
    store: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed at any request of a read: a named error, never a mixture of two objects."""
    monkeypatch.setattr(object_store, "RANGE_BYTES", 1000)
    for moment in range(1, 6):
        store.put("a.bin", DATA, '"first"')
        store.requests.clear()
        store.faults = iter([(300, RESET), None, (300, RESET), None, None])

        def change(moment: int = moment) -> None:
            if len(store.requests) == moment:
                store.put("a.bin", DATA[::-1], '"second"')

        store.before_request = change
        if moment == 5:  # after the last request
            assert storage.read_range(f"{ROOT}/a.bin", 0, 3000) == DATA
        else:
            with pytest.raises(UserError, match=r"a\.bin was changed: its content changed during the read"):
                storage.read_range(f"{ROOT}/a.bin", 0, 3000)
            assert len(store.requests) == moment + 1
        assert [tag for _, _, tag in store.requests] == [None, *['"first"'] * (len(store.requests) - 1)]


def test_the_etag_of_the_first_response_holds_where_later_ones_have_none(store: Objects) -> None:
    """Some gateways leave it out of answers to ranges that they have cached."""
    store.faults = iter([(300, RESET), (300, RESET), (300, RESET)])

    def change() -> None:
        store.with_etag = not store.requests
        if len(store.requests) == 3:
            store.put("a.bin", DATA[::-1], '"second"')

    store.before_request = change
    with pytest.raises(UserError, match=r"a\.bin was changed: its content changed during the read"):
        storage.read_range(f"{ROOT}/a.bin", 0, 3000)


@pytest.mark.parametrize(
    ("etag", "size", "message"),
    [('"second"', 3000, "its ETag is"), ('"first"', 2999, "it has 2999 bytes now, 3000 before")],
)
def test_an_object_that_is_not_the_counted_one_is_refused_at_once(
    store: Objects, etag: str, size: int, message: str
) -> None:
    version = version_of('"first"')
    assert storage.read_range(f"{ROOT}/a.bin", 5, 9, 3000, version) == DATA[5:14]
    store.put("a.bin", DATA[:size], etag)
    store.requests.clear()
    with pytest.raises(UserError, match=rf"a\.bin was changed: {message}"):
        storage.read_range(f"{ROOT}/a.bin", 5, 9, 3000, version)
    assert len(store.requests) == 1
    assert store.served == [("a.bin", 5, 9)]  # of the first read


def test_a_connection_that_delivers_too_slowly_is_closed_and_read_on(
    store: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then never reaches the read timeout; the GET has one of its own."""
    monkeypatch.setenv("DROMOS_READ_TIMEOUT", "0.01")
    monkeypatch.setenv("DROMOS_READ_TRIES", "3")
    store.size, read = 1, Body.read

    async def slowly(self: Body, most: int) -> bytes:
        await asyncio.sleep(0.004)
        return await read(self, most)

    monkeypatch.setattr(Body, "read", slowly)
    with pytest.raises(ReadError, match=r"stopped at byte \d+ after 3 tries: .*no response in time"):
        storage.read_range(f"{ROOT}/a.bin", 100, 2000)
    assert len(store.requests) == 3
    assert [at for _, at, _ in store.served] == list(range(100, 100 + len(store.served)))
    assert len(store.served) < 1000


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("TRIES", "BACKOFF", "TIMEOUT") for value in ("x", "-1", "nan")]
    + [("TRIES", "0"), ("TRIES", "1.5"), ("TIMEOUT", "0")],
)
def test_a_setting_that_allows_no_read_is_a_user_error(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"DROMOS_READ_{name}", value)
    with pytest.raises(UserError, match="DROMOS_READ_TRIES"):
        RetryPolicy.of_environment()


def test_settings_come_from_their_own_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TRIES", "3"), ("BACKOFF", "0"), ("TIMEOUT", "7")):
        monkeypatch.setenv(f"DROMOS_READ_{name}", value)
    assert RetryPolicy.of_environment() == RetryPolicy(tries=3, backoff=0.0, timeout=7.0)


@pytest.mark.parametrize("cached", [False, True])
def test_no_level_repeats_the_tries_of_the_one_below(
    store: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    """A batch from a store that stays away: one sample, as many requests as tries, and no pause of the rows' own."""
    monkeypatch.setenv("DROMOS_READ_TRIES", "3")
    monkeypatch.setattr(
        "data_pipeline.batches.row_builder.time.sleep", lambda _: pytest.fail("a second pause")
    )
    folder = write_packed(tmp_path / "t", [5])
    tar = (folder / "00000.tar").read_bytes()
    store.put("00000.tar", tar)
    counts, sizes = np.array([5]), np.array([len(tar)])
    manifest = Manifest("t", ROOT, ["00000.tar"], counts, sizes, "tar", "")
    spec = StreamSpec("text", 1, {"t": SourceSpec(ROOT)}, batch=5, text=PackedFormat(LENGTH))
    cache = CacheSettings(str(tmp_path / "cache"), 10**9) if cached else None
    builder = BatchBuilder(spec, {"t": manifest}, cache=cache)
    store.faults = itertools.repeat(refusal("SlowDown", 503))
    with pytest.raises(
        ReadError, match=r"source 't': .*00000\.tar, sample \d: .*after 3 tries.*No sample was"
    ):
        builder.make(0, 0, 5)
    assert len(store.requests) == 3
    store.faults = iter([])
    assert builder.make(0, 0, 5).tokens[:, 0].sum() == 0 + 1 + 2 + 3 + 4
    builder.close()


@pytest.mark.parametrize("chunks", [1, 2, 4, 5, 8, 9, 22])
def test_a_range_in_chunks_is_whole_and_a_failed_chunk_goes_on(
    store: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunks: int
) -> None:
    """Chunks are read in parallel; each goes on at its byte, and they come in order."""
    monkeypatch.setattr("data_pipeline.storage.cached_ranges.RANGE_BYTES", 128)
    stop = 17 + 128 * chunks - 3
    byte_range = ByteRange(f"{ROOT}/a.bin", 3000, version_of('"first"'), 17, stop)
    store.faults = itertools.cycle([(40, RESET), refusal("SlowDown", 503), None])
    store.size = 13
    assert b"".join(read_chunks(byte_range)) == DATA[17:stop]
    served = sorted((at, length) for _, at, length in store.served)
    assert sum(length for _, length in served) == stop - 17
    assert all(a + n == b for (a, n), (b, _) in itertools.pairwise(served))
    cache = Cache(CacheSettings(str(tmp_path), 10**6))
    assert fetch(cache, byte_range)
    assert cache.read(byte_range, 20, stop - 1) == DATA[20 : stop - 1]
    store.requests.clear()
    assert fetch(cache, byte_range)
    assert store.requests == []
    store.put("a.bin", DATA[::-1], '"second"')
    other = ByteRange(f"{ROOT}/a.bin", 3000, version_of('"first"'), 18, stop)
    with pytest.raises(UserError, match=r"a\.bin was changed: its ETag is"):
        fetch(cache, other)
    assert not cache.has(other)
