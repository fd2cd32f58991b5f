"""Node cache: only whole ranges are served, each is downloaded once, the byte limit holds, disk errors stop no run."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline.errors import ReadError
from data_pipeline.storage.cache import ByteRange, Cache, CacheSettings
from tests.support.ingredients import assert_distinct, assert_each_changes

MEGABYTE = 1_000_000


def settings(folder: Path, limit: int = MEGABYTE) -> CacheSettings:
    return CacheSettings(str(folder / "cache"), limit)


def part(number: int, length: int = 1000, version: int = 1, size: int = MEGABYTE) -> ByteRange:
    return ByteRange("s3://b/0.tar", size, version, number * length, (number + 1) * length)


def content(byte_range: ByteRange) -> bytes:
    return random.Random(f"{byte_range}").randbytes(byte_range.stop - byte_range.start)


def put(cache: Cache, byte_range: ByteRange) -> bool:
    return cache.ensure(byte_range, lambda: [content(byte_range)[:7], content(byte_range)[7:]])


def whole(cache: Cache, byte_range: ByteRange) -> bytes | None:
    return cache.read(byte_range, byte_range.start, byte_range.stop)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and len(path.name) >= 32]


def test_ranges_are_shared_by_all_processes(tmp_path: Path) -> None:
    cache, other = Cache(settings(tmp_path)), Cache(settings(tmp_path))
    assert whole(cache, part(3)) is None
    assert not cache.has(part(3))
    assert put(cache, part(3))
    for one in (cache, other):
        assert one.has(part(3))
        assert whole(one, part(3)) == content(part(3))
        assert one.read(part(3), 3010, 3500) == content(part(3))[10:500]
    # Another size, version or range is another object.
    for changed in (part(3, size=MEGABYTE + 1), part(3, version=2), part(6, 500)):
        assert whole(cache, changed) is None


def test_the_folder_is_this_users_alone(tmp_path: Path) -> None:
    put(Cache(settings(tmp_path)), part(0))
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in files(tmp_path))


@pytest.mark.parametrize("wrong", ["link", "file", "open", "unwritable"])
def test_a_folder_that_cannot_be_trusted_turns_the_cache_off_with_one_warning(
    tmp_path: Path, wrong: str
) -> None:
    folder = tmp_path / "cache"
    if wrong == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif wrong == "file":
        folder.write_bytes(b"")
    elif wrong == "open":
        folder.mkdir()
        folder.chmod(0o777)
    else:
        folder = Path("/proc/dromos")  # not even root can create a folder there
    chosen = CacheSettings(str(folder), MEGABYTE)
    with pytest.warns(UserWarning, match=r"the cache .* cannot be used .*loader\.cache\.folder"):
        cache = Cache(chosen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.off
        assert not put(cache, part(0))
        assert whole(cache, part(0)) is None
        cache.set_warming(True)
        assert not cache.warming()
    assert not files(tmp_path)


def test_a_full_disk_turns_the_cache_off_and_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(settings(tmp_path))
    put(cache, part(0))
    writes = iter([None, OSError(28, "No space left on device")])

    def write(descriptor: int, data: bytes) -> None:
        error = next(writes)
        if error is not None:
            raise error
        os.write(descriptor, data)

    monkeypatch.setattr("data_pipeline.storage.cache._write", write)
    with pytest.warns(UserWarning, match="No space left"):
        assert not put(cache, part(1))
    assert whole(cache, part(1)) is None
    assert len(files(tmp_path)) == 1


def test_a_download_that_fails_is_raised_and_the_next_one_works(tmp_path: Path) -> None:
    cache = Cache(settings(tmp_path))

    def broken() -> Iterator[bytes]:
        yield content(part(0))[:10]
        raise ReadError("no answer")

    with pytest.raises(ReadError, match="no answer"):
        cache.ensure(part(0), broken)
    with pytest.raises(OSError, match="is incomplete"):
        cache.ensure(part(0), lambda: [b"short"])
    assert not cache.off
    assert not files(tmp_path)
    assert put(cache, part(0))
    assert whole(cache, part(0)) == content(part(0))


def test_a_file_of_another_length_is_not_served(tmp_path: Path) -> None:
    cache = Cache(settings(tmp_path))
    put(cache, part(0))
    with open(cache.path(part(0)), "ab") as file:
        file.write(b"x")
    assert whole(Cache(settings(tmp_path)), part(0)) is None


def test_least_recently_used_ranges_are_evicted_first(tmp_path: Path) -> None:
    limit = 20 * 1000
    cache = Cache(settings(tmp_path, limit))
    for number in range(20):
        put(cache, part(number))
        os.utime(cache.path(part(number)), (number, number))
    assert cache.has(part(0))  # sets the time of last use
    assert whole(Cache(settings(tmp_path, limit)), part(1)) is not None  # so does a read
    kept = []
    for number in range(20, 200):
        put(cache, part(number))
        assert sum(path.stat().st_size for path in files(tmp_path)) <= limit
        kept.append(len(files(tmp_path)))
        if number == 22:
            assert cache.has(part(0))
            assert cache.has(part(1))
            assert not cache.has(part(2))
            assert not cache.has(part(3))
    assert min(kept) >= 17
    cache.close_files()
    assert not cache.ensure(part(0, length=limit + 1), lambda: [])


def test_released_ranges_are_evicted_first(tmp_path: Path) -> None:
    cache = Cache(settings(tmp_path, 20_000))
    for number in range(20):
        put(cache, part(number))
    assert whole(cache, part(19)) is not None
    for number in (17, 18, 19):
        cache.release(part(number))
    cache.release(part(77))  # not cached: no error
    put(cache, part(20))
    assert [number for number in range(21) if cache.has(part(number))] == [*range(17), 20]
    cache.release(part(3))
    assert cache.has(part(3))  # sets the time of last use, so it counts as needed again
    for number in (21, 22, 23):
        put(cache, part(number))
    assert cache.has(part(3))


def test_an_evicted_file_stays_readable_while_it_is_open(tmp_path: Path) -> None:
    cache = Cache(settings(tmp_path))
    put(cache, part(0))
    assert whole(cache, part(0)) is not None
    os.unlink(cache.path(part(0)))
    assert whole(cache, part(0)) == content(part(0))
    cache.close_files()
    assert whole(cache, part(0)) is None


def test_parallel_requests_download_once(tmp_path: Path) -> None:
    downloads = []
    begun = threading.Event()

    def slow() -> Iterator[bytes]:
        downloads.append(threading.get_ident())
        begun.set()
        time.sleep(0.2)
        yield content(part(0))

    found: list[bytes | None] = []

    def run() -> None:
        cache = Cache(settings(tmp_path))
        assert cache.ensure(part(0), slow)
        found.append(whole(cache, part(0)))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [content(part(0))] * 8
    assert len(downloads) == 1


def test_ensure_gives_up_after_its_timeout(tmp_path: Path) -> None:
    cache, other = Cache(settings(tmp_path)), Cache(settings(tmp_path))

    def pieces() -> Iterator[bytes]:
        assert not other.ensure(part(0), lambda: [content(part(0))], timeout=0.05)
        yield content(part(0))

    assert cache.ensure(part(0), pieces)


def test_a_wait_for_another_download_has_growing_pauses_and_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 ms, doubled up to 0.1 s, until the time is over; the clock is the test's."""
    cache, pauses = Cache(settings(tmp_path)), []
    clock = SimpleNamespace(monotonic=lambda: sum(pauses), sleep=pauses.append, time=time.time)
    monkeypatch.setattr("data_pipeline.storage.cache.time", clock)
    unfinished = Path(cache.path(part(0)) + ".part")
    unfinished.parent.mkdir()
    with unfinished.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert not cache.ensure(part(0), lambda: pytest.fail("downloaded twice"), timeout=3.0)
    assert pauses == [0.005, 0.01, 0.02, 0.04, 0.08, *[0.1] * (len(pauses) - 5)]
    assert 3.0 < sum(pauses) <= 3.1 + 1e-9
    assert put(cache, part(0))


CHILD = """
    import os, sys, time
    from tests.data_pipeline.storage.test_cache import *
    cache = Cache(CacheSettings(sys.argv[1], MEGABYTE))
    def pieces():
        yield content(part(0))[:400]
        print("half", flush=True)
        time.sleep(60)
    cache.ensure(part(0), pieces)
"""


def test_a_killed_download_does_not_block_others(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(folder)], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"half\n"
    cache = Cache(settings(tmp_path))
    assert whole(cache, part(0)) is None
    assert not cache.ensure(part(0), lambda: [content(part(0))], timeout=0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    [unfinished] = files(tmp_path)
    assert unfinished.stat().st_size == 400
    os.utime(unfinished, (1, 1))
    cache.sweep()
    assert not files(tmp_path)
    assert put(cache, part(0))
    assert whole(cache, part(0)) == content(part(0))


HAMMER = """
    import random, sys, time
    from tests.data_pipeline.storage.test_cache import *
    draws = random.Random(int(sys.argv[2]))
    cache = Cache(CacheSettings(sys.argv[1], 30_000))
    print("go", flush=True)
    while True:
        one = part(draws.randrange(60))
        found = whole(cache, one)
        if found is None:
            put(cache, one)
            found = whole(cache, one)
        assert found is None or found == content(one), one
        if draws.random() < 0.2:
            cache.close_files()
"""


def test_processes_killed_at_any_instant_leave_whole_ranges(tmp_path: Path) -> None:
    folder, draws = tmp_path / "cache", random.Random(5)

    def start(seed: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", textwrap.dedent(HAMMER), str(folder), str(seed)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"go\n"
        child.stdout.close()
        return child

    children = [start(seed) for seed in range(3)]
    for seed in range(3, 9):
        time.sleep(draws.uniform(0.05, 0.3))
        victim = children.pop(0)
        assert victim.poll() is None  # its assertion on the bytes has not failed
        victim.kill()
        victim.wait()
        children.append(start(seed))
    for child in children:
        assert child.poll() is None
        child.kill()
        child.wait()
    cache = Cache(CacheSettings(str(folder), 30_000))
    kept = [one for one in map(part, range(60)) if cache.has(one)]
    assert len(kept) >= 10
    assert all(whole(cache, one) == content(one) for one in kept)
    assert sum(path.stat().st_size for path in files(folder) if not path.suffix) <= 31_000


def test_files_of_an_earlier_boot_are_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = Cache(settings(tmp_path))
    put(earlier, part(0))
    del earlier
    monkeypatch.setattr("data_pipeline.storage.cache._boot_id", lambda: "later")
    later = Cache(settings(tmp_path))
    assert whole(later, part(0)) is None
    later.sweep()
    assert not files(tmp_path)


def test_a_process_that_waits_for_a_failed_download_downloads_itself(tmp_path: Path) -> None:
    """The waiting process gets the lock on a file that the failed process has removed."""
    begun, waiting = threading.Event(), threading.Event()

    def failing() -> Iterator[bytes]:
        begun.set()
        assert waiting.wait(10)
        time.sleep(0.1)
        raise ReadError("gone")
        yield b""

    failed: list[BaseException] = []

    def other() -> None:
        try:
            Cache(settings(tmp_path)).ensure(part(0), failing)
        except ReadError as error:
            failed.append(error)

    first = threading.Thread(target=other)
    first.start()
    assert begun.wait(10)
    locks, flock = [], fcntl.flock

    def counted(descriptor: int, kind: int) -> None:
        locks.append(kind)
        if len(locks) == 2:  # the lock on the unfinished file; the first is on the folder
            waiting.set()
            flock(descriptor, fcntl.LOCK_EX)  # blocks until the other process has removed the file
        else:
            flock(descriptor, kind)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(fcntl, "flock", counted)
        cache = Cache(settings(tmp_path))
        assert put(cache, part(0))
    first.join()
    assert failed
    assert whole(cache, part(0)) == content(part(0))


def test_machines_that_share_the_folder_keep_each_others_files(tmp_path: Path) -> None:
    code = """
    import sys
    from data_pipeline.storage import cache
    cache._boot_id = lambda: "elsewhere"
    theirs = cache.Cache(cache.CacheSettings(sys.argv[1], 10**6))
    theirs.ensure(cache.ByteRange("s3://b/0.tar", 10**6, 1, 0, 7), lambda: [b"theirs!"])
    print("ready", flush=True)
    sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "cache")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        ours = Cache(settings(tmp_path))
        put(ours, part(0))
        ours.sweep()
        assert len(files(tmp_path)) == 2
        other.kill()
        other.wait()
    ours.sweep()
    assert len(files(tmp_path)) == 1
    assert whole(ours, part(0)) == content(part(0))


@pytest.mark.parametrize(
    ("name", "limit"),
    [("offsets-0", 30 * 24 * 60), (".offsets-1.7.ab.tmp", 60), ("warming-2", 60), ("a.part", 60)],
)
def test_unfinished_files_are_kept_for_an_hour_and_unused_offsets_for_thirty_days(
    tmp_path: Path, name: str, limit: int
) -> None:
    cache = Cache(settings(tmp_path))
    put(cache, part(0))
    path = tmp_path / "cache" / name
    for minutes, is_kept in ((0, True), (limit - 1, True), (limit + 1, False)):
        path.write_bytes(b"")
        written = time.time() - 60 * minutes
        os.utime(path, (written, written))
        cache.sweep()
        assert path.exists() == is_kept
    assert whole(cache, part(0)) == content(part(0))


def test_ranges_are_kept_where_the_kernel_does_not_tell_the_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_text = Path.read_text

    def without_boot_id(path: Path, *arguments: Any) -> str:
        if path.name == "boot_id":
            raise PermissionError
        return read_text(path, *arguments)

    monkeypatch.setattr(Path, "read_text", without_boot_id)
    put(Cache(settings(tmp_path)), part(0))
    assert whole(Cache(settings(tmp_path)), part(0)) == content(part(0))
    monkeypatch.undo()
    assert whole(Cache(settings(tmp_path)), part(0)) is None


def test_a_limit_of_zero_keeps_nothing(tmp_path: Path) -> None:
    cache = Cache(settings(tmp_path, 0))
    assert not put(cache, part(0))
    assert not (tmp_path / "cache").exists()


def test_the_default_limit_stays_while_the_cache_fills_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = 2_000_000

    def usage(_: object) -> shutil._ntuple_diskusage:
        used = sum(path.stat().st_size for path in files(tmp_path))
        return shutil._ntuple_diskusage(disk, used, disk - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    cache = Cache(CacheSettings.of(str(tmp_path / "cache")))
    assert cache.settings.limit_bytes == disk // 2
    for number in range(400):
        put(cache, part(number))
    assert len(files(tmp_path)) == 400
    assert CacheSettings.of(str(tmp_path / "cache")).limit_bytes == disk // 2


def test_the_default_folder_and_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DROMOS_CACHE", raising=False)
    assert CacheSettings.of().folder.endswith(f"/dromos-cache-{os.getuid()}")
    monkeypatch.setenv("DROMOS_CACHE", str(tmp_path / "a" / "b"))
    chosen = CacheSettings.of()
    assert chosen.folder == str(tmp_path / "a" / "b")
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert 0 < chosen.limit_bytes <= min(100e9, 0.6 * free)
    assert CacheSettings.of(str(tmp_path), 2.5) == CacheSettings(str(tmp_path), 2_500_000_000)
    assert CacheSettings.of().token != CacheSettings.of().token


def test_the_name_of_a_range_has_every_ingredient() -> None:
    base = {"url": "s3://b/0.tar", "size": 900, "version": 7, "start": 12, "stop": 345}
    others = [
        ("url", "s3://b/1.tar"), ("url", "s3://c/0.tar"), ("url", "s3://b/0.tar9"), ("url", "s3://b/caf\udce9.tar"),
        ("size", 901), ("version", 8), ("version", 0), ("version", 2**63 + 7), ("start", 13), ("stop", 344),
    ]  # fmt: skip
    assert_each_changes(lambda **fields: ByteRange(**fields).name, base, others)
    # Digits that move over the boundary of two neighbours.
    fields = [(1, 23, 456, 7890), (12, 3, 456, 7890), (1, 234, 56, 7890), (1, 23, 4567, 890)]
    assert_distinct([(str(numbers), ByteRange("s3://b/0", *numbers).name) for numbers in fields])
    assert ByteRange("s3://b/0.tar1", 0, 1, 2, 3).name != ByteRange("s3://b/0.tar", 10, 1, 2, 3).name
    assert all(len(ByteRange("s3://b/0", *numbers).name) == 32 for numbers in fields)
