"""Indexing: incremental scans, killed and concurrent runs, damaged tars, duplicates; on disk and on S3."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.index import build, parallel
from data_pipeline.index.build import build_index
from data_pipeline.index.shard_record import scan_shard
from data_pipeline.sources.manifest import open_source
from data_pipeline.sources.shard_reader import ShardReader
from data_pipeline.sources.tar import TarWriter
from data_pipeline.storage import files
from tests.support.launching import alive, wait_for
from tests.support.recorded_files import recorded
from tests.support.s3_server import s3_server
from tests.support.tars import truth, write_entries

ROOT = Path(__file__).parents[3]
SHARDS = 12


def write_shard(path: str, shard: int, samples: int, extra: int = 0) -> None:
    random = np.random.default_rng([shard, extra])
    with TarWriter(path) as tar:
        for index in range(samples):
            tar.write(
                f"{shard:05d}{index:04d}", {"txt": b"a", "jpg": random.bytes(int(random.integers(2000)))}
            )


def fill(root: str, shards: int = SHARDS) -> str:
    for shard in range(shards):
        write_shard(f"{root}/{shard:05d}.tar", shard, 3 + shard % 5)
    return root


@pytest.fixture
def root(tmp_path: Path) -> str:
    return fill(str(tmp_path / "source"))


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as bucket:
        yield bucket


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the scans of each tar from now on, by path."""
    counted: Counter[str] = Counter()

    def counting(url: str, path: str, size: int, version: str) -> object:
        counted[path] += 1
        return scan_shard(url, path, size, version)

    monkeypatch.setattr(build, "scan_shard", counting)
    return counted


def index_of(root: str) -> tuple[dict[str, list[object]], bytes]:
    """Content of an index: columns of shards.parquet, bytes of the offset file."""
    table = parquet.read_table(f"{root}/_index/shards.parquet")
    name = table.schema.metadata[b"offsets"].decode()
    return table.to_pydict(), (Path(root) / "_index" / name).read_bytes()


def check(root: str) -> None:
    """Assert that reading through the index gives what tarfile reads."""
    manifest = open_source("a", root)
    reader = ShardReader(manifest)
    assert manifest.counted_by == "manifest"
    for shard, path in enumerate(manifest.paths):
        want = truth(Path(root) / path)
        assert [reader.read(shard, i) for i in range(len(want))] == [
            (key, members) for key, _, members in want
        ]
    reader.close()


def test_only_new_and_changed_tars_are_scanned(root: str, scans: Counter[str]) -> None:
    first = build_index(root)
    assert (first.scanned, first.reused, first.samples) == (SHARDS, 0, first.manifest.samples)
    assert set(scans.values()) == {1}
    scans.clear()
    before = index_of(root)
    again = build_index(root)
    assert (again.scanned, again.reused, scans) == (0, SHARDS, {})
    assert index_of(root) == before
    write_shard(f"{root}/00003.tar", 3, 9, extra=1)  # its size changes
    size = os.path.getsize(f"{root}/00004.tar")
    write_shard(f"{root}/00004.tar", 4, 7)  # only its modification time changes
    assert os.path.getsize(f"{root}/00004.tar") == size
    write_shard(f"{root}/{SHARDS:05d}.tar", SHARDS, 2)
    os.unlink(f"{root}/00000.tar")
    last = build_index(root)
    assert scans == {"00003.tar": 1, "00004.tar": 1, f"{SHARDS:05d}.tar": 1}
    assert last.manifest.paths == [f"{n:05d}.tar" for n in range(1, SHARDS + 1)]
    check(root)
    assert sorted(os.listdir(f"{root}/_index"))[1:] == ["shards.parquet"]


def test_indexing_some_shards_keeps_the_rest_of_the_index(root: str, scans: Counter[str]) -> None:
    build_index(root + "/{00002,00005}.tar")
    assert build_index(root + "/{00007..00008}.tar").manifest.paths == ["00007.tar", "00008.tar"]
    assert open_source("a", root + "/{00002,00005,00008}.tar").counted_by == "manifest"
    with pytest.raises(UserError, match=r"00000\.tar is not in the index"):
        open_source("a", root)
    build_index(root)
    assert set(scans.values()) == {1}
    check(root)


def test_a_damaged_index_is_repaired(root: str, scans: Counter[str]) -> None:
    build_index(root)
    before = index_of(root)
    offsets = next(Path(root, "_index").glob("offsets-*.bin"))
    data = bytearray(offsets.read_bytes())
    data[5] ^= 255  # in the block of the first shard
    offsets.write_bytes(data)
    scans.clear()
    build_index(root)
    assert scans == {"00000.tar": 1}
    assert index_of(root) == before
    Path(root, "_index", "shards.parquet").write_bytes(b"junk")
    build_index(root)
    assert index_of(root) == before


def test_parallel_scans_give_the_same_index(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(root, tmp_path / "other")
    build_index(root)
    monkeypatch.setattr(parallel, "MIN_BYTES_PER_PROCESS", 1)
    reports: list[tuple[int, int, int, int]] = []
    build_index(str(tmp_path / "other"), jobs=3, progress=lambda *state: reports.append(state))
    assert index_of(root) == index_of(str(tmp_path / "other"))
    total = sum(os.path.getsize(f"{root}/{n:05d}.tar") for n in range(SHARDS))
    assert [done for done, *_ in reports] == list(range(1, SHARDS + 1))
    assert reports[-1] == (SHARDS, SHARDS, open_source("a", root).samples, total)


def test_all_damaged_tars_are_named_and_the_others_are_saved(root: str, scans: Counter[str]) -> None:
    for shard in (1, 6):
        path = Path(root) / f"{shard:05d}.tar"
        with tarfile.open(path) as tar:
            last = tar.getmembers()[-1]
        path.write_bytes(path.read_bytes()[: last.offset])  # in the middle of the last sample
    (Path(root) / "00004.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(UserError) as failure:
        build_index(root)
    message = str(failure.value)
    assert f"3 of the {SHARDS} tars" in message
    for name in ("00001.tar is cut off", "00004.tar", "00006.tar is cut off", f"dromos data index {root}"):
        assert name in message
    assert "it holds 3 complete samples before the cut" in message  # 00001.tar had 4
    assert not os.path.exists(f"{root}/_index/shards.parquet")
    for shard in (1, 4, 6):
        write_shard(f"{root}/{shard:05d}.tar", shard, 4)
    scans.clear()
    build_index(root)
    assert set(scans) == {"00001.tar", "00004.tar", "00006.tar"}
    assert not os.path.exists(f"{root}/_index/parts")
    check(root)


# Indexes the folder argv[1]; after argv[2] tars it prints a line and waits to be killed.
KILLED = """
import sys, time
from data_pipeline.index import build
from data_pipeline.index.shard_record import scan_shard
scanned = 0
def slow(url, path, size, version):
    global scanned
    scanned += 1
    if scanned > int(sys.argv[2]):
        print("waiting", flush=True)
        time.sleep(600)
    return scan_shard(url, path, size, version)
build.scan_shard = slow
build.build_index(sys.argv[1], part_seconds=0.0)
"""


@pytest.mark.parametrize("kills", [[0, 5, 4]])
def test_a_killed_run_resumes(root: str, tmp_path: Path, scans: Counter[str], kills: list[int]) -> None:
    shutil.copytree(root, tmp_path / "whole")
    build_index(str(tmp_path / "whole"))
    scans.clear()
    for after in kills:
        command = [sys.executable, "-c", KILLED, root, str(after)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
            assert run.stdout is not None
            assert run.stdout.readline() == "waiting\n"
            run.kill()
        assert run.returncode == -signal.SIGKILL
        assert not os.path.exists(f"{root}/_index/shards.parquet")
    build_index(root)
    assert len(scans) == SHARDS - sum(kills)
    assert set(scans.values()) == {1}
    assert index_of(root) == index_of(str(tmp_path / "whole"))
    assert len(os.listdir(f"{root}/_index")) == 2


def test_unfinished_files_of_killed_runs_are_removed_a_day_later(root: str) -> None:
    build_index(root)
    for name in (".offsets-0123456789abcdef.bin.7.ab.tmp", ".shards.parquet.7.cd.tmp"):
        Path(root, "_index", name).write_bytes(b"half")
    build_index(root)
    assert len(os.listdir(f"{root}/_index")) == 4  # another run may be writing them
    for path in Path(root, "_index").glob("*.tmp"):
        os.utime(path, (0, 0))
    build_index(root)
    assert len(os.listdir(f"{root}/_index")) == 2


def test_a_cut_at_any_instant_leaves_the_old_index_or_the_new_one(tmp_path: Path) -> None:
    """Every state that a kill or a power cut may leave, of a first run and of one after a shard was added."""
    root = fill(str(tmp_path / "root"), 2)
    with recorded(tmp_path / "root") as disk:
        build_index(root)
        first = index_of(root)
        disk.promise("first")
        for shard in (2, 3):
            write_shard(f"{root}/{shard:05d}.tar", shard, 4)
        build_index(root, part_seconds=0.0)  # with a part
        second = index_of(root)
        disk.promise("second")
    states = Counter[int]()
    for outcome in disk.outcomes():
        outcome.write(tmp_path / "cut")
        cut = str(tmp_path / "cut")
        if os.path.exists(f"{cut}/_index/shards.parquet"):
            states[[first, second].index(index_of(cut))] += 1
            assert "second" not in outcome.promised or index_of(cut) == second, outcome.after
        else:
            assert not outcome.promised, outcome.after
        if outcome.kill:  # the next run repairs whatever is left
            build_index(cut)
            check(cut)
    assert len(states) == 2


INDEX = """
import sys
from data_pipeline.index.build import build_index
build_index(sys.argv[1], part_seconds=0.0)
"""


POOL = """
import os, signal, sys, time
from data_pipeline.index import parallel

def scan_forever(*_):
    try:
        os.write(1, b"%8d" % os.getpid())
        time.sleep(600)
    except BaseException:
        os.write(2, b"the scan was disturbed")
        raise

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the command does
    parallel.MIN_BYTES_PER_PROCESS = 1
    try:
        list(parallel.map_shards(scan_forever, [(str(n), "", 9, "") for n in range(9)], 2))
    except KeyboardInterrupt:
        sys.exit(75)
"""


@pytest.mark.parametrize(("number", "to_all"), [("SIGKILL", False), ("SIGTERM", False), ("SIGINT", True)])
def test_a_run_that_is_stopped_ends_at_once_with_its_processes_and_in_silence(
    tmp_path: Path, number: str, to_all: bool
) -> None:
    """Ctrl-C reaches all processes, and only the first one acts; it does not wait for scans that are queued."""
    script = tmp_path / "run.py"
    script.write_text(POOL)
    command = [sys.executable, str(script)]
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as run:  # fmt: skip
        assert run.stdout is not None
        workers = {int(run.stdout.read(8)) for _ in range(2)}
        assert run.pid not in workers
        for pid in workers if to_all else ():
            os.kill(pid, signal.Signals[number])  # before the others, so that they have the time to react
        (os.killpg if to_all else os.kill)(run.pid, signal.Signals[number])
        _, said = run.communicate(timeout=60)
    if number == "SIGKILL":
        assert run.returncode == -signal.SIGKILL
    else:
        assert (run.returncode, said) == (75, b"")
    wait_for(lambda: not any(alive(pid) for pid in workers), "the processes to end", 30)


def test_two_runs_at_once(root: str, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "whole")
    build_index(str(tmp_path / "whole"))
    command = [sys.executable, "-c", INDEX, root]
    for _ in range(2):
        runs = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) for _ in range(3)]
        assert [run.wait(60) for run in runs] == [0, 0, 0]
        assert index_of(root) == index_of(str(tmp_path / "whole"))
        write_shard(f"{root}/00000.tar", 0, 8, extra=2)  # so that the next round replaces an existing index
        shutil.copy2(f"{root}/00000.tar", tmp_path / "whole" / "00000.tar")
        build_index(str(tmp_path / "whole"))
    assert sorted(os.listdir(f"{root}/_index"))[1:] == ["shards.parquet"]


def test_an_unwritable_folder_is_an_error_before_the_scan(
    root: str, tmp_path: Path, scans: Counter[str]
) -> None:
    Path(root, "_index").write_text("a file")
    with pytest.raises(UserError, match=r"_index cannot be written to; .*links"):
        build_index(root)
    os.unlink(f"{root}/_index")
    os.rename(f"{root}/00000.tar", os.fsencode(root) + b"/\xff.tar")
    with pytest.raises(UserError, match=r"udcff\.tar' is not a valid UTF-8 name"):
        build_index(root)
    assert scans == {}


def test_two_runs_over_parts_of_a_folder(root: str) -> None:
    """Two runs over different shards of a folder keep each other's results, in either order."""
    halves = [f"{root}/{{{first:05d}..{first + 5:05d}}}.tar" for first in (0, 6)]
    runs = [
        subprocess.Popen([sys.executable, "-c", INDEX, half], cwd=ROOT, stdout=subprocess.DEVNULL)
        for half in halves
    ]
    assert [run.wait(60) for run in runs] == [0, 0]
    check(root)


def test_a_tar_that_cannot_be_read_is_named_with_the_others(
    root: str, scans: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = storage.read_descriptor

    def broken(descriptor: int, offset: int, length: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("00002.tar"):
            raise OSError(5, "Input/output error")
        return real(descriptor, offset, length)

    monkeypatch.setattr(storage, "read_descriptor", broken)
    with pytest.raises(
        UserError, match=r"1 of the 12 tars .*00002\.tar cannot be read: .*Input/output error"
    ):
        build_index(root)
    monkeypatch.undo()
    assert build_index(root).scanned == 1


def test_duplicates_and_split_samples_are_found(root: str) -> None:
    shutil.copy(f"{root}/00002.tar", f"{root}/00099.tar")
    write_entries(
        Path(root) / "00050.tar", [(n, tarfile.REGTYPE, 3) for n in ("a.jpg", "b.jpg", "a.txt", "b.txt")]
    )
    for name in (
        "00060",
        "00061",
    ):  # equal headers, different content: keys restart at 0, members have one size
        with TarWriter(f"{root}/{name}.tar") as tar:
            tar.write("0", {"npy": name.encode() * 30_000})
    found = build_index(root)
    assert found.findings.duplicates == [["00002.tar", "00099.tar"]]
    assert found.findings.split == {"00050.tar": ["a", "b"]}
    assert build_index(root).findings == found.findings


def test_remote_and_local_indexes_are_alike(s3: str, root: str, tmp_path: Path, scans: Counter[str]) -> None:
    remote = fill(f"{s3}/{tmp_path.name}")
    build_index(root)
    scans.clear()
    found = build_index(remote, part_seconds=0.0)
    assert (found.scanned, set(scans.values())) == (SHARDS, {1})
    assert found.manifest.fingerprint == open_source("a", root).fingerprint
    here, there = ShardReader(open_source("a", root)), ShardReader(open_source("a", remote))
    places = [(s, i) for s, n in enumerate(found.manifest.counts.tolist()) for i in range(n)]
    assert [here.read(*place) for place in places] == [there.read(*place) for place in places]
    write_shard(f"{remote}/00005.tar", 5, 3, extra=5)
    again = build_index(remote)
    assert (again.scanned, again.reused) == (1, SHARDS - 1)
    store = storage.filesystem(remote)
    store.invalidate_cache()
    names = [name.rpartition("/")[2] for name in store.find(f"{remote}/_index")]
    assert sorted(names)[1:] == ["shards.parquet"]
    assert names[0].startswith("offsets-")


def test_a_read_only_bucket_is_an_error_before_the_scan(
    s3: str, root: str, scans: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    for path in Path(root).glob("*.tar"):
        storage.publish(f"{s3}/closed/{path.name}", path.read_bytes())
    monkeypatch.setattr(files, "_put", refuse)
    with pytest.raises(
        UserError, match=rf"permission denied writing {s3}/closed/_index/.*\(refused: Access Denied\)"
    ):
        build_index(f"{s3}/closed")
    assert not scans
    with pytest.raises(UserError, match=rf"permission denied writing {s3}/a\.bin"):
        storage.publish(f"{s3}/a.bin", b"x")


def test_large_members_of_a_remote_tar_are_not_fetched(s3: str, tmp_path: Path) -> None:
    """Headers after a large member are fetched in small pieces."""
    from data_pipeline.storage.object_store import requests

    root = f"{s3}/{tmp_path.name}"
    with TarWriter(f"{root}/0.tar") as tar:
        for number in range(3):
            tar.write(str(number), {"mp4": bytes(20 << 20)})
    before = requests.bytes
    assert build_index(root).samples == 3
    assert requests.bytes - before < 20 << 20


def test_the_error_about_many_broken_tars_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number in range(400):
        (tmp_path / "a" / f"{number:05d}.tar").write_bytes(b"x" * 100)
    write_shard(str(tmp_path / "a" / "good.tar"), 0, 3)
    with pytest.raises(UserError) as caught:
        build_index(str(tmp_path / "a"))
    text = str(caught.value)
    assert text.startswith("400 of the 401 tars")
    assert "; and 390 more: 00010.tar to 00399.tar (390)" in text
    assert text.count(" is cut off") == 10
    assert len(text) < 5000
