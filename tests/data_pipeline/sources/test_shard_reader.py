"""Manifests counted by index, statistics and headers; the reader against webdataset; errors of damaged sources."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_pipeline import storage
from data_pipeline.errors import UserError
from data_pipeline.index.build import build_index
from data_pipeline.sources.manifest import INDEX_FORMAT, open_source
from data_pipeline.sources.scan import sample_starts
from data_pipeline.sources.shard_reader import ShardReader
from data_pipeline.sources.tar import TarWriter
from tests.support.s3_server import s3_server

COUNTS = [5, 0, 3, 7]


def fill(root: str, counts: list[int] = COUNTS, stats: bool = False, **extra: object) -> str:
    for shard, count in enumerate(counts):
        with TarWriter(f"{root}/{shard:05d}.tar") as tar:
            for index in range(count):
                key = f"{shard:05d}{index:04d}"
                tar.write(key, {"txt": key.encode(), "jpg": bytes([index]) * (100 * index), "seg.png": b"s"})
        if stats:
            content = {"count": count + 1, "successes": count, "failed_to_download": 1, **extra}
            storage.publish(f"{root}/{shard:05d}_stats.json", json.dumps(content).encode())
    return root


@pytest.fixture
def root(tmp_path: Path) -> str:
    return fill(str(tmp_path / "source"))


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as bucket:
        yield bucket


def everything(root: str) -> list[tuple[str, dict[str, bytes]]]:
    manifest = open_source("a", root)
    reader = ShardReader(manifest)
    try:
        return [reader.read(s, i) for s, count in enumerate(manifest.counts) for i in range(count)]
    finally:
        reader.close()


def by_webdataset(root: str) -> list[tuple[str, dict[str, bytes]]]:
    shards = [str(p) for p in sorted(Path(root).glob("*.tar"))]
    found = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
    return [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in found]


def test_three_origins_of_counts_agree(root: str) -> None:
    by_tar = open_source("a", root)
    fill(root, stats=True)
    by_stats = open_source("a", root)
    built = build_index(root).manifest
    by_index = open_source("a", root)
    assert [m.counted_by for m in (by_tar, by_stats, built, by_index)] == [
        "tar",
        "stats",
        "manifest",
        "manifest",
    ]
    assert len({m.fingerprint for m in (by_tar, by_stats, built, by_index)}) == 1
    for manifest in (by_tar, by_stats, built, by_index):
        assert manifest.counts.tolist() == COUNTS
        assert manifest.counts.dtype == np.int64
        assert manifest.paths == [f"{n:05d}.tar" for n in range(4)]
        assert manifest.sizes.tolist() == [os.path.getsize(f"{root}/{n:05d}.tar") for n in range(4)]


@pytest.mark.parametrize("indexed", [False, True])
def test_the_reader_reads_what_webdataset_reads(root: str, indexed: bool) -> None:
    if indexed:
        build_index(root)
    found = everything(root)
    assert found == by_webdataset(root)
    assert len(found) == sum(COUNTS)


def test_the_fingerprint_depends_on_the_content_not_the_folder(root: str, tmp_path: Path) -> None:
    here = open_source("a", root).fingerprint
    shutil.move(root, tmp_path / "moved")
    moved = str(tmp_path / "moved")
    assert open_source("other name", moved).fingerprint == here
    assert open_source("a", moved + "/{00000..00003}.tar").fingerprint == here
    assert open_source("a", moved + "/{00000..00002}.tar").fingerprint != here
    assert open_source("a", moved + "/{00001,00000,00002,00003}.tar").fingerprint != here
    fill(moved, [5, 0, 3, 8])
    assert open_source("a", moved).fingerprint != here


def test_the_tokenizer_is_part_of_the_fingerprint(root: str) -> None:
    prints = set()
    for tokenizer in ("aaaa", "bbbb"):
        fill(root, stats=True, tokenizer=tokenizer)
        assert open_source("a", root).tokenizer == tokenizer
        before = open_source("a", root).fingerprint
        build_index(root)
        assert open_source("a", root).fingerprint == before
        assert open_source("a", root).tokenizer == tokenizer
        shutil.rmtree(f"{root}/_index")
        prints.add(before)
    assert len(prints) == 2
    storage.publish(f"{root}/00000_stats.json", json.dumps({"successes": 5, "tokenizer": "aaaa"}).encode())
    with pytest.raises(UserError, match="different tokenizers"):
        open_source("a", root)


def count_scans(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the scans of each tar from now on, by URL."""
    scans: Counter[str] = Counter()

    def counted(source: str | bytes, where: str) -> np.ndarray:
        scans[where] += 1
        return sample_starts(source, where)

    monkeypatch.setattr("data_pipeline.sources.shard_reader.sample_starts", counted)
    monkeypatch.setattr("data_pipeline.sources.remote_shards.sample_starts", counted)
    return scans


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_each_shard_is_scanned_once(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    shards = 90 if place == "disk" else 5
    root = str(tmp_path) if place == "disk" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    manifest = open_source("a", fill(root, [2] * shards))
    scans = count_scans(monkeypatch)
    reader = ShardReader(manifest, files=3)
    for index in (0, 1, 0):
        for shard in range(shards):
            key, members = reader.read(shard, index)
            assert key == members["txt"].decode() == f"{shard:05d}{index:04d}"
        reader.reopen()  # as after a read error
    assert sorted(scans.values()) == [1] * shards
    reader.close()


def test_the_tar_that_was_not_used_for_the_longest_time_is_closed(tmp_path: Path) -> None:
    reader = ShardReader(open_source("a", fill(str(tmp_path), [2] * 3)), files=2)
    for shard in (0, 1, 0, 2):
        reader.read(shard, 0)
    assert list(reader._files) == [0, 2]
    reader.close()


def test_learned_ranges_stay_within_their_limit_and_warn(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = open_source("a", root)
    scans = count_scans(monkeypatch)
    whole = by_webdataset(root)
    starts = np.concatenate([[0], np.cumsum(COUNTS)])
    reader = ShardReader(manifest, scanned_bytes=4 * 8, files=1)
    places = [(0, 4), (3, 6), (0, 0), (2, 2), (3, 0)]
    with pytest.warns(UserWarning, match=f"run: dromos data index {root}"):
        found = [reader.read(shard, index) for shard, index in places]
    assert found == [whole[starts[shard] + index] for shard, index in places]
    assert scans == {f"{root}/00000.tar": 2, f"{root}/00003.tar": 2, f"{root}/00002.tar": 1}
    assert len(reader._files) == 1
    reader.close()
    build_index(root)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        indexed = ShardReader(open_source("a", root), scanned_bytes=1)
        assert [indexed.read(3, i) for i in range(7)] == whole[8:]
        assert indexed.read(0, 1) == whole[1]


@pytest.mark.parametrize("promised", [2, 9])
def test_wrong_statistics_name_shard_and_both_counts(root: str, promised: int) -> None:
    fill(root, stats=True)
    storage.publish(f"{root}/00002_stats.json", json.dumps({"count": 9, "successes": promised}).encode())
    reader = ShardReader(open_source("a", root))
    reader.read(0, 0)
    message = rf"00002\.tar holds 3 samples, but .*00002_stats\.json says {promised}"
    with pytest.raises(UserError, match=message):
        reader.read(2, 0)
    with pytest.raises(UserError, match=message):
        build_index(root)
    assert not os.path.exists(f"{root}/_index/shards.parquet")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"successes": "3"}', b'{"successes": -1}', b'{"successes": true}']
)
def test_invalid_statistics_are_named(root: str, content: bytes) -> None:
    storage.publish(f"{root}/00002_stats.json", content)
    with pytest.raises(UserError, match=r"source 'pairs'.*00002_stats\.json.*remove"):
        open_source("pairs", root)


def test_a_truncated_tar_is_named(root: str) -> None:
    path = Path(root) / "00003.tar"
    path.write_bytes(path.read_bytes()[:4000])
    for call in (lambda: open_source("pairs", root), lambda: build_index(root)):
        with pytest.raises(UserError, match=r"00003\.tar is cut off"):
            call()


def test_missing_paths_are_named(tmp_path: Path, root: str) -> None:
    with pytest.raises(UserError, match=r"source 'digits': .*nowhere does not exist.*dromos data prepare"):
        open_source("digits", str(tmp_path / "nowhere"))
    with pytest.raises(
        UserError, match=r"source 'digits': .*nowhere\.tar does not exist.*dromos data prepare"
    ):
        open_source("digits", str(tmp_path / "nowhere.tar"))
    with pytest.raises(UserError, match=r"2 of the 6 shards of .* missing, the first is .*00004\.tar"):
        open_source("digits", root + "/{00000..00005}.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"source 'digits': .*empty holds no \.tar files"):
        open_source("digits", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="hold no samples"):
        open_source("digits", fill(str(tmp_path / "hollow"), [0, 0]))


def test_an_index_older_than_the_shards_is_refused(root: str) -> None:
    build_index(root)
    fill(root, [5, 0, 3, 6])
    with pytest.raises(
        UserError,
        match=r"00003\.tar has \d+ bytes now, but had \d+ when it was indexed; run: dromos data index",
    ):
        open_source("a", root)
    assert build_index(root).manifest.samples == 14
    fill(root, [5, 0, 3, 6, 1])
    with pytest.raises(UserError, match=r"00004\.tar is not in the index.*run: dromos data index"):
        open_source("a", root)
    build_index(root)
    assert everything(root) == by_webdataset(root)
    assert len(os.listdir(f"{root}/_index")) == 2  # the offset files of earlier indexes are removed


def test_part_of_an_indexed_folder(root: str) -> None:
    build_index(root)
    manifest = open_source("a", root + "/{00003,00000}.tar")
    assert manifest.counts.tolist() == [7, 5]
    assert ShardReader(manifest).read(0, 6)[0] == "000030006"


@pytest.mark.parametrize("damage", [b"no parquet", b""])
def test_a_damaged_index_is_named(root: str, damage: bytes) -> None:
    build_index(root)
    storage.publish(f"{root}/_index/shards.parquet", damage)
    with pytest.raises(UserError, match=r"shards\.parquet is not a valid index.*run: dromos data index"):
        open_source("a", root)


def test_an_index_with_a_flipped_bit_is_refused_or_correct(root: str) -> None:
    """Indexing again repairs it, reusing the intact part."""
    build_index(root)
    want = everything(root)
    random = np.random.default_rng(0)
    refused = 0
    for path in sorted(Path(root, "_index").iterdir()):
        whole = path.read_bytes()
        for _ in range(120):
            data = bytearray(whole)
            data[random.integers(len(data))] ^= 1 << random.integers(8)
            path.write_bytes(data)
            try:
                assert everything(root) == want
            except UserError as error:
                assert "dromos data index" in str(error)  # noqa: PT017
                refused += 1
            if random.random() < 0.1:
                build_index(root)
                assert everything(root) == want
        path.write_bytes(whole)
    assert refused > 120


def test_an_index_cannot_point_elsewhere(root: str) -> None:
    import pyarrow as pa

    build_index(root)
    table = pa.table(
        {"path": ["00000.tar"]}, metadata={"dromos_index": INDEX_FORMAT, "offsets": "../../etc/passwd"}
    )
    storage.publish_table(f"{root}/_index/shards.parquet", table)
    with pytest.raises(UserError, match="is not a valid index"):
        open_source("a", root)


def test_a_shard_that_shrinks_while_it_is_open_is_named(root: str) -> None:
    reader = ShardReader(open_source("a", root))
    reader.read(3, 0)
    os.truncate(f"{root}/00003.tar", 1024)
    with pytest.raises(UserError, match=r"00003\.tar is shorter than before"):
        reader.read(3, 6)


@pytest.mark.parametrize("indexed", [False, True])
def test_s3_gives_the_same_samples(s3: str, tmp_path: Path, indexed: bool) -> None:
    local = fill(str(tmp_path / "source"))
    remote = fill(f"{s3}/{tmp_path.name}", stats=not indexed)
    if indexed:
        build_index(remote)
    manifest = open_source("a", remote)
    assert manifest.counted_by == ("manifest" if indexed else "stats")
    assert manifest.fingerprint == open_source("a", local).fingerprint
    assert everything(remote) == by_webdataset(local)
    assert open_source("a", remote + "/{00000..00003}.tar").fingerprint == manifest.fingerprint
