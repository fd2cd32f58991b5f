"""Reads from a failing S3 endpoint: interrupted reads resume, and errors after the last retry name the object."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator

import pytest

from data_pipeline import storage
from data_pipeline.errors import ReadError, UserError
from data_pipeline.storage import object_store
from tests.support.faulty_proxy import KINDS, Proxy
from tests.support.s3_server import faulty_s3

DATA = random.Random(1).randbytes(5 << 20)
Store = tuple[str, Proxy]


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    with faulty_s3() as (root, proxy):
        storage.publish(f"{root}/a.bin", DATA)
        yield root, proxy


@pytest.fixture
def store(server: Store) -> Iterator[Store]:
    _, proxy = server
    proxy.rate, proxy.kinds = 0.0, KINDS
    proxy.reset_counters()
    yield server
    proxy.rate, proxy.kinds = 0.0, KINDS


def test_a_large_range_is_read_in_pieces(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    root, proxy = store
    monkeypatch.setattr(object_store, "RANGE_BYTES", 1 << 20)
    before = object_store.requests.gets
    start, stop = 12_345, 12_345 + (3 << 20)
    assert storage.read_range(f"{root}/a.bin", start, stop - start, len(DATA)) == DATA[start:stop]
    ranges = [tuple(map(int, re.findall(r"\d+", requested))) for _, requested in proxy.log]
    assert len(ranges) == 3 == object_store.requests.gets - before
    assert ranges[0][0] == start
    assert ranges[-1][1] == stop - 1
    assert all(low == high + 1 for (_, high), (low, _) in itertools.pairwise(ranges))
    assert all((1 << 19) <= high + 1 - low <= (1 << 20) for low, high in ranges)


@pytest.mark.parametrize("kind", ["truncate", "stall"])
def test_an_interrupted_body_resumes_at_the_failed_byte(store: Store, kind: str) -> None:
    root, proxy = store
    proxy.kinds = (kind,)
    length = 900_000
    seed = next(s for s in range(100) if _draws(s, 3) == [True, True, False])
    proxy.rate, proxy._draws = 0.5, random.Random(seed)
    assert storage.read_range(f"{root}/a.bin", 100, length) == DATA[100 : 100 + length]
    first = [int(re.findall(r"\d+", requested)[0]) for _, requested in proxy.log]
    # The proxy sends two thirds of the requested bytes before it fails.
    assert first == [100, 100 + 600_000, 100 + 600_000 + 200_000]
    assert sum(proxy.bytes.values()) == length


def _draws(seed: int, count: int) -> list[bool]:
    draws = random.Random(seed)
    found = []
    for _ in range(count):
        found.append(draws.random() < 0.5)
        if found[-1]:
            draws.choice(("only",))
    return found


def test_every_call_is_right_while_a_third_of_the_requests_fail(store: Store) -> None:
    root, proxy = store
    seed = 1
    proxy.rate, proxy._draws = 1 / 3, random.Random(seed)
    draws = random.Random(seed)
    for name in ("a", "b", "c"):
        proxy.rate = 0
        storage.publish(f"{root}/{seed}/{name}.tar", name.encode() * 5)
        proxy.rate = 1 / 3
    for _ in range(25):
        start = draws.randrange(len(DATA) - 1)
        stop = draws.randrange(start + 1, min(len(DATA), start + 300_000) + 1)
        assert storage.read_range(f"{root}/a.bin", start, stop - start, len(DATA)) == DATA[start:stop]
    assert storage.read_bytes(f"{root}/a.bin") == DATA
    tars = [f"{root}/{seed}/{name}.tar" for name in "abc"]
    assert storage.list_shards(f"{root}/{seed}") == tars == storage.list_shards(f"{root}/{seed}/*.tar")
    assert storage.read_many([*tars, f"{root}/no"]) == {tar: tar[-5].encode() * 5 for tar in tars}
    assert storage.sizes([*tars, f"{root}/no"]) == dict.fromkeys(tars, 5)
    assert storage.size(f"{root}/a.bin") == len(DATA)
    assert storage.exists(f"{root}/a.bin")
    assert not storage.exists(f"{root}/no")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{root}/no")
    assert set(proxy.faults) == set(KINDS)


def test_the_number_of_tries_is_exact_and_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    root, proxy = store
    monkeypatch.setenv("DROMOS_READ_TRIES", "4")
    proxy.rate = 1.0
    # aiohttp itself repeats a request whose connection is reset before the response.
    for kind, each in (("503", 1), ("reset", 2)):
        proxy.kinds = (kind,)
        proxy.reset_counters()
        with pytest.raises(
            ReadError,
            match=rf"{root}/a\.bin could not be read: stopped at byte 7 after 4 tries: (503 SlowDown, |503, )?\w+Error",
        ):
            storage.read_range(f"{root}/a.bin", 7, 10)
        assert sum(proxy.gets.values()) == 4 * each
        proxy.reset_counters()
        with pytest.raises(
            ReadError,
            match=rf"{root}/a\.bin could not be read after 4 tries: (503 SlowDown, |503, )?\w+Error",
        ):
            storage.size(f"{root}/a.bin")
        assert proxy.faults[kind] == 4 * each


def test_an_object_that_was_changed_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    root, proxy = store
    url = f"{root}/b.bin"
    storage.publish(url, b"old" * 100)
    assert storage.read_range(url, 3, 3, 300) == b"old"
    storage.publish(url, b"newer" * 100)
    with pytest.raises(
        UserError, match=rf"{url} was changed: it has 500 bytes now, 300 before; .*dromos data index"
    ):
        storage.read_range(url, 3, 3, 300)
    with pytest.raises(UserError, match=r"was changed: it ends before"):
        storage.read_range(url, 600, 3)
    assert len(proxy.log) == 3  # no retries: they could not help

    # The object changes after it was listed, with the same size.
    tags: dict[str, int] = {}
    storage.sizes([url], tags)
    assert storage.read_range(url, 3, 3, 500, tags[url]) == b"ern"
    storage.publish(url, b"after" * 100)
    before = len(proxy.log)
    with pytest.raises(UserError, match=rf"{url} was changed: its ETag is .*dromos data index"):
        storage.read_range(url, 3, 3, 500, tags[url])
    assert len(proxy.log) == before + 1

    # The object changes between two pieces of one read.
    proxy.reset_counters()
    monkeypatch.setattr(object_store, "RANGE_BYTES", 100)
    count = Proxy.count

    def change(self: Proxy, key: str, requested: str) -> None:
        count(self, key, requested)
        if len(proxy.log) == 2:
            storage.publish(url, b"later" * 100)

    monkeypatch.setattr(Proxy, "count", change)
    with pytest.raises(UserError, match=rf"{url} was changed: its content"):
        storage.read_range(url, 0, 300, 500)


@pytest.mark.parametrize(
    ("answered", "kind", "said"),
    [
        ({"ContentRange": "bytes 12-19/100"}, ReadError, "requested bytes from 10, received bytes from 12"),
        ({"ContentLength": 100}, UserError, "does not support range"),
    ],
)
def test_a_response_with_other_bytes_is_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch, answered: dict[str, object], kind: type, said: str
) -> None:
    import s3fs

    root, _ = store
    monkeypatch.setenv("DROMOS_READ_TRIES", "2")  # the first case is tried again
    ask = s3fs.S3FileSystem._call_s3

    async def wrong_response(self: object, *args: object, **kwargs: object) -> object:
        answer = await ask(self, *args, **kwargs)
        return {"Body": answer["Body"], **answered}

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", wrong_response)
    with pytest.raises(kind, match=said):
        storage.read_range(f"{root}/a.bin", 10, 8)


def test_missing_and_forbidden_objects_fail_without_retries(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, proxy = store
    with pytest.raises(UserError, match=rf"{root}/no\.tar is gone"):
        storage.read_range(f"{root}/no.tar", 0, 10)
    with pytest.raises(UserError, match=r"s3://no-such-bucket-here does not exist"):
        storage.list_shards("s3://no-such-bucket-here")
    assert len(proxy.log) == 1

    async def refuse(*args: object, **kwargs: object) -> None:
        from botocore.exceptions import ClientError
        from s3fs.errors import translate_boto_error

        answer = {
            "Error": {"Code": "AccessDenied", "Message": "Access Denied"},
            "ResponseMetadata": {"HTTPStatusCode": 403},
        }
        raise translate_boto_error(ClientError(answer, "GetObject"))

    monkeypatch.setattr(object_store._reader(root), "_call_s3", refuse)
    with pytest.raises(UserError, match=r"permission denied reading .*a\.bin \(AccessDenied: .*credentials"):
        storage.read_range(f"{root}/a.bin", 0, 10)


def test_other_protocols_are_read_too() -> None:
    import fsspec

    fsspec.filesystem("memory").pipe_file("/folder/a.bin", b"0123456789")
    assert storage.read_range("memory://folder/a.bin", 2, 5) == b"23456"
    assert storage.read_bytes("memory://folder/a.bin") == b"0123456789"
    assert storage.size("memory://folder/a.bin") == 10


def test_reads_of_a_store_that_is_not_s3_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        def cat_file(self, url: str, start: int, end: int) -> bytes:
            return DATA[start:end]

    monkeypatch.setattr(object_store, "_reader", lambda url: Memory())
    gets, count = object_store.requests.gets, object_store.requests.bytes
    assert object_store.read("memory://a", 10, 70, None, 0) == DATA[10:70]
    assert (object_store.requests.gets - gets, object_store.requests.bytes - count) == (1, 60)
