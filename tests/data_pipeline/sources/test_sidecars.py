"""Counts from index files of DALI, Energon and wids, written as those tools write them; wrong counts are detected."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.index.build import build_index
from data_pipeline.show import describe
from data_pipeline.sources import manifest
from data_pipeline.sources.manifest import open_source
from data_pipeline.sources.scan import Scan, scan_file
from data_pipeline.sources.shard_reader import ShardReader
from tests.support.s3_server import s3_server
from tests.support.tars import Entry, truth, write_entries

FILE = tarfile.REGTYPE
SHARDS = 3


def entries(shard: int, awkward: bool = False) -> list[Entry]:
    found: list[Entry] = []
    for number in range(12 + shard):
        key = f"{'long' * 40 if awkward and number % 4 == 1 else 'k'}{shard}_{number}"
        found += [(f"{key}.jpg", FILE, number * 300), (f"{key}.txt", FILE, number % 2 * 5)]
        if awkward and number % 5 == 2:
            found += [
                ("folder", tarfile.DIRTYPE, 0),
                (f"__meta__/{number}.json", FILE, 9),
                ("README", FILE, 600),
            ]
    return found


def fill(root: Path, awkward: bool = False) -> Path:
    root.mkdir(exist_ok=True)
    for shard in range(SHARDS):
        write_entries(root / f"{shard}.tar", entries(shard, awkward), tarfile.GNU_FORMAT)
    return root


@pytest.fixture(params=[False, True], ids=["plain", "awkward"])
def root(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return fill(tmp_path / "source", request.param)


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the scans of each tar for its sample count, by file name."""
    counted: Counter[str] = Counter()

    def counting(url: str, size: int | None = None) -> Scan:
        counted[url.rpartition("/")[2]] += 1
        return scan_file(url, size)

    monkeypatch.setattr(manifest, "scan_file", counting)
    return counted


def energon(path: Path, offsets: list[int] | None = None) -> Path:
    """Write Energon 7's .tar.idx: offset of each sample's first member, then of the end, as uint64."""
    if offsets is None:
        with tarfile.open(path) as tar:
            list(tar)
            offsets = [first for _, first, _ in truth(path)] + [tar.offset]  # type: ignore[attr-defined]
    written = path.with_suffix(".tar.idx")
    written.write_bytes(struct.pack(f"<{len(offsets)}Q", *offsets))
    return written


def dali(path: Path, version: str = "v1.2") -> Path:
    """Write DALI's .idx as wds2idx does: GNU tar's listing with block numbers, grouped by the part before the dot."""
    listed = subprocess.run(
        ["tar", "--list", "--verbose", "--block-number", "--file", path],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    parts = [re.match(r"block (\d+): (\S)\S+ \S+ +(\d+) \S+ \S+ (.*)", line) for line in listed]
    blocks = [int(line.split()[1].rstrip(":")) for line in listed]
    lines: list[list[str]] = []
    last = None
    for number, part in enumerate(parts):
        if part is None or part[2] != "-":
            continue
        size, name = int(part[3]), part[4]
        end = blocks[number + 1] * 512 if number + 1 < len(blocks) else None
        assert end is not None
        dot = name.find(".", name.rfind("/") + 1)
        key, extension = name[:dot], name[dot + 1 :]
        if key != last:
            lines.append([])
            last = key
        offset = end - -(-size // 512) * 512
        lines[-1] += [extension, str(offset), str(size), *([name] if version == "v1.2" else [])]
    written = path.with_suffix(".idx")
    written.write_text(f"{version} {len(lines)}\n" + "".join(" ".join(line) + "\n" for line in lines))
    return written


def check(root: Path) -> None:
    """Assert that the reader reads what tarfile reads."""
    reader = ShardReader(open_source("a", str(root)))
    for shard in range(SHARDS):
        want = truth(root / f"{shard}.tar")
        assert [reader.read(shard, i) for i in range(len(want))] == [(k, m) for k, _, m in want]
    reader.close()


def counts(root: Path) -> list[int]:
    return [len(truth(root / f"{shard}.tar")) for shard in range(SHARDS)]


def test_energon_offsets_give_counts(root: Path, scans: Counter[str]) -> None:
    for shard in range(SHARDS):
        energon(root / f"{shard}.tar")
    found = open_source("a", str(root))
    assert (found.counted_by, found.counts.tolist(), scans) == ("sidecar", counts(root), {})
    check(root)


@pytest.mark.parametrize("version", ["v1.1", "v1.2"])
def test_dali_index_gives_counts(tmp_path: Path, scans: Counter[str], version: str) -> None:
    root = fill(tmp_path / "source")
    for shard in range(SHARDS):
        dali(root / f"{shard}.tar", version)
    found = open_source("a", str(root))
    assert (found.counted_by, found.counts.tolist(), scans) == ("sidecar", counts(root), {})
    check(root)


def test_a_wrong_dali_count_is_an_error(tmp_path: Path) -> None:
    """wds2idx counts __meta__ members and files without a dot as samples; the wrong count is an error."""
    root = fill(tmp_path / "source", awkward=True)
    for shard in range(SHARDS):
        dali(root / f"{shard}.tar")
    reader = ShardReader(open_source("a", str(root)))
    with pytest.raises(
        UserError, match=r"0\.tar holds 12 samples, but .*/0\.idx says \d+; .*correct or remove that file"
    ):
        reader.read(0, 0)
    with pytest.raises(UserError, match=r"3 of the 3 tars .*0\.idx says"):
        build_index(str(root))
    assert sum(".idx says" in problem for problem in describe(str(root))["problems"]) == 3
    for shard in range(SHARDS):
        (root / f"{shard}.idx").unlink()
    build_index(str(root))
    check(root)


@pytest.mark.parametrize("above", [False, True])
def test_energon_info_gives_counts(root: Path, above: bool) -> None:
    folder = root.parent if above else root
    named = {f"{'source/' if above else ''}{s}.tar": n for s, n in enumerate(counts(root))}
    (folder / ".nv-meta").mkdir()
    (folder / ".nv-meta/.info.json").write_text(
        json.dumps({"energon_version": "7.4.1", "shard_counts": named})
    )
    found = open_source("a", str(root))
    assert (found.counted_by, found.counts.tolist()) == ("sidecar", counts(root))
    check(root)


def wids(root: Path, **changed: object) -> None:
    shards = [
        {"url": f"{s}.tar", "nsamples": n, "filesize": (root / f"{s}.tar").stat().st_size, **changed}
        for s, n in enumerate(counts(root))
    ]
    content = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards}
    (root / "train.json").write_text(json.dumps(content))


def test_wids_counts(root: Path, scans: Counter[str]) -> None:
    wids(root)
    found = open_source("a", str(root))
    assert (found.counted_by, found.counts.tolist(), scans) == ("sidecar", counts(root), {})
    check(root)


def test_a_wids_index_of_other_tars_is_ignored(root: Path) -> None:
    wids(root, filesize=77)
    with pytest.warns(
        UserWarning,
        match=r"train\.json: .* has 77 bytes, but it has \d+\. The samples are counted from the tars",
    ):
        found = open_source("a", str(root))
    assert (found.counted_by, found.counts.tolist()) == ("tar", counts(root))


def test_an_impossible_count_is_ignored(root: Path) -> None:
    wids(root, nsamples=10**9)
    with pytest.warns(UserWarning, match=r"0\.tar: an index file says 1000000000 samples"):
        assert open_source("a", str(root)).counts.tolist() == counts(root)
    (root / "train.json").unlink()
    for shard in range(SHARDS):
        energon(root / f"{shard}.tar", list(range(1001)))
    with pytest.warns(UserWarning, match=r"0\.tar: an index file says 1000 samples"):
        assert open_source("a", str(root)).counts.tolist() == counts(root)


def test_a_wrong_wids_count_is_an_error(root: Path) -> None:
    wids(root, nsamples=3)
    reader = ShardReader(open_source("a", str(root)))
    with pytest.raises(UserError, match=r"1\.tar holds 13 samples, but .*/train\.json says 3"):
        reader.read(1, 0)


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"v9.9 3\n", b"v1.2 12\njunk", b"v1.2 12\n" + b"jpg 512 0 a b.jpg\n" * 12, bytes(16)],
)
@pytest.mark.parametrize("suffix", [".idx", ".tar.idx"])
def test_junk_is_ignored_or_an_error(tmp_path: Path, content: bytes, suffix: str) -> None:
    root = fill(tmp_path / "source")
    (root / f"0{suffix}").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check(root)
        except UserError as error:
            assert "0.tar holds 12 samples, but" in str(error)  # noqa: PT017


def test_offsets_are_ignored(tmp_path: Path) -> None:
    """An offset of another member would give a sample without its first members."""
    root = fill(tmp_path / "source")
    for shard in range(SHARDS):
        offsets = np.frombuffer(energon(root / f"{shard}.tar").read_bytes(), "<u8").tolist()
        energon(root / f"{shard}.tar", [offset + 512 for offset in offsets])
    assert open_source("a", str(root)).counted_by == "sidecar"
    check(root)


WRONG = {
    "dali": lambda root: (root / "1.idx").write_text("v1.2 99\n"),
    "energon": lambda root: energon(root / "1.tar", [0, 512, 1024]),
    "energon info": lambda root: info(root, {"0.tar": 12, "1.tar": 3, "2.tar": 14}),
    "wids": lambda root: (root / "index.json").write_text(
        json.dumps({"shardlist": [{"url": f"{n}.tar", "nsamples": (12, 5, 14)[n]} for n in range(SHARDS)]})
    ),
}


def info(root: Path, counts: dict[str, int]) -> None:
    (root / ".nv-meta").mkdir()
    (root / ".nv-meta" / ".info.json").write_text(json.dumps({"shard_counts": counts}))


@pytest.mark.parametrize("with_stats", [False, True])
@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_count_is_held_against_the_tar(tmp_path: Path, kind: str, with_stats: bool) -> None:
    """As that of `_stats.json` is, by show and index, also where a right `_stats.json` decides the count."""
    root = fill(tmp_path / "source")
    if with_stats:
        for shard in range(SHARDS):
            (root / f"{shard}_stats.json").write_text(json.dumps({"successes": 12 + shard}))
    WRONG[kind](root)
    message = (
        r"1\.tar holds 13 samples, but .*/(1\.idx|1\.tar\.idx|\.nv-meta/\.info\.json|index\.json) says \d+"
    )
    problems = [problem for problem in describe(str(root))["problems"] if re.search(message, problem)]
    assert len(problems) == 1
    with pytest.raises(UserError, match=message):
        build_index(str(root))


@pytest.mark.parametrize("start", ["", "./", "/elsewhere/set/", "http://host/set/", "s3://bucket/set/"])
def test_wids_shards_are_matched_by_path(tmp_path: Path, start: str) -> None:
    """Two folders have a 0.tar each; the counts and sizes of one are not held against the other."""
    (tmp_path / "source").mkdir()
    for folder, shard in (("a", 0), ("b", 2)):
        write_entries(fill(tmp_path / "source" / folder) / "0.tar", entries(shard), tarfile.GNU_FORMAT)
    root = tmp_path / "source"
    listed = [
        {
            "url": f"{start}{folder}/0.tar",
            "nsamples": count,
            "filesize": (root / folder / "0.tar").stat().st_size,
        }
        for folder, count in (("a", 12), ("b", 14))
    ]
    for order in (listed, listed[::-1]):
        (root / "index.json").write_text(json.dumps({"wids_version": 1, "shardlist": order}))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opened = open_source("a", f"{root}/{{a,b}}/0.tar")
        assert (opened.counted_by, opened.counts.tolist()) == ("sidecar", [12, 14])
    # Their pictures are no pictures, which is another problem.
    problems = describe(f"{root}/{{a,b}}/0.tar")["problems"]
    assert [problem for problem in problems if "samples decoded are unusable" not in problem] == []
    # Below a, the last part of an address could be that of either shard: neither is taken.
    (root / "a" / "index.json").write_text(json.dumps({"shardlist": listed}))
    (root / "a" / "1.tar").unlink()
    (root / "a" / "2.tar").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_source("a", str(root / "a"))
    assert (opened.counted_by, opened.counts.tolist()) == ("tar", [12])


def test_the_files_that_people_met(shared: Path) -> None:
    source = shared / "cases/data/counts_of_others"
    about = describe(str(source / "dali_wrong"))
    assert any(
        "0.tar holds 10 samples" in problem and "0.idx says 12" in problem for problem in about["problems"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_source("a", f"{source}/wids_two/{{a,b}}/0.tar")
    assert (opened.counted_by, opened.counts.tolist()) == ("sidecar", [10, 6])
    assert describe(f"{source}/wids_two/{{a,b}}/0.tar")["problems"] == []


def test_our_index_has_priority(root: Path) -> None:
    build_index(str(root))
    energon(root / "0.tar", [0, 512, 1024])
    assert open_source("a", str(root)).counted_by == "manifest"
    check(root)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as bucket:
        yield bucket


def test_remote_counts(s3: str, tmp_path: Path, scans: Counter[str]) -> None:
    root, remote = fill(tmp_path / "source"), f"{s3}/{tmp_path.name}"
    for shard in range(SHARDS):
        for path in (root / f"{shard}.tar", energon(root / f"{shard}.tar")):
            storage.publish(f"{remote}/{path.name}", path.read_bytes())
    found = open_source("a", remote)
    assert (found.counted_by, found.counts.tolist(), scans) == ("sidecar", counts(root), {})
    want = truth(root / "2.tar")
    reader = ShardReader(found)
    assert [reader.read(2, i) for i in range(len(want))] == [(key, members) for key, _, members in want]
