"""Views against brute force: the n-th kept sample, joins by key, and training on the kept samples only."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import storage
from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.evaluation_pass import EvaluationPass
from data_pipeline.batches.spec import SourceSpec
from data_pipeline.errors import UserError
from data_pipeline.index import parallel
from data_pipeline.index.build import build_index
from data_pipeline.index.build_view import Rule, build_view
from data_pipeline.sources.manifest import open_source
from data_pipeline.sources.offsets import Offsets
from data_pipeline.sources.remote_shards import RemoteShards
from data_pipeline.sources.scan import scan_file
from data_pipeline.sources.shard_reader import ShardReader
from data_pipeline.sources.tar import TarWriter
from data_pipeline.sources.views import SAMPLES_PER_BLOCK, View, bitmap_content, pack_bits
from data_pipeline.storage.cache import CacheSettings
from tests.support.s3_server import s3_server
from tests.support.samples import members, pairs

COUNTS = [7, 0, 1, 30]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as bucket:
        yield bucket


def rows_of(shard: int) -> list[dict[str, Any]]:
    """Rows of img2dataset's parquet: with failed downloads, and in another order than the tar."""
    random = np.random.default_rng(shard)
    rows = [
        {
            "key": f"{shard:05d}{index:04d}",
            "status": "success" if index < COUNTS[shard] else "failed_to_download",
            "similarity": float(random.random()) if index % 5 else None,
            "width": int(random.integers(100, 500)),
            "uid": f"{shard:016x}{index:016x}",
        }
        for index in range(COUNTS[shard] + 2)
    ]
    random.shuffle(rows)  # type: ignore[arg-type]
    return rows


def write_source(root: str) -> str:
    for shard, count in enumerate(COUNTS):
        with TarWriter(f"{root}/{shard:05d}.tar") as tar:
            for index in range(count):
                tar.write(f"{shard:05d}{index:04d}", members(shard, index))
        storage.publish_table(f"{root}/{shard:05d}.parquet", pa.Table.from_pylist(rows_of(shard)))
    return root


@pytest.fixture
def root(tmp_path: Path) -> str:
    return write_source(str(tmp_path / "source"))


def is_kept(row: dict[str, Any]) -> bool:
    return row["similarity"] is not None and row["similarity"] > 0.4 and row["width"] >= 150


WHERE = "similarity > 0.4 and width >= 150"


def kept_places() -> list[tuple[int, int]]:
    good = {row["key"] for shard in range(len(COUNTS)) for row in rows_of(shard) if is_kept(row)}
    return [(s, i) for s, n in enumerate(COUNTS) for i in range(n) if f"{s:05d}{i:04d}" in good]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_nth_kept_sample_is_found(data: st.DataObject) -> None:
    counts = data.draw(
        st.lists(st.sampled_from([0, 1, 7, 511, 512, 513, 1024, 3000]), min_size=1, max_size=4)
    )
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    masks = [random.random(count) < data.draw(st.sampled_from([0, 0.01, 0.5, 0.99, 1])) for count in counts]
    bits = [pack_bits(mask) for mask in masks]
    content, first = bitmap_content(np.concatenate(bits).reshape(-1), np.array([b.size for b in bits]))
    places = [(shard, k) for shard, mask in enumerate(masks) for k in range(int(mask.sum()))]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/v-0123456789abcdef.bits"
        Path(path).write_bytes(content)
        view = pickle.loads(pickle.dumps(View("v", path, first, np.array(counts, np.int64))))
        assert view.digest == "0123456789abcdef"
        if places:
            at = np.array(places)[random.permutation(len(places))]
            want = [int(np.flatnonzero(masks[shard])[k]) for shard, k in at]
            assert view.tar_positions(at[:, 0], at[:, 1]).tolist() == want
        for shard, mask in enumerate(masks):
            with pytest.raises(IndexError):
                view.tar_positions(np.array([shard]), np.array([int(mask.sum())]))


def test_a_view_takes_one_bit_per_sample() -> None:
    bits = pack_bits(np.ones(10_000, bool))
    content, _ = bitmap_content(bits.reshape(-1), np.array([bits.size]))
    assert len(content) * 8 / 10_000 < 1.1
    assert bits.shape == (-(-10_000 // SAMPLES_PER_BLOCK), SAMPLES_PER_BLOCK // 8)


@pytest.mark.parametrize("indexed", [False, True])
def test_a_filter_keeps_the_matching_samples(root: str, indexed: bool) -> None:
    if indexed:
        build_index(root)
    built = build_view(root, "good", Rule(where=WHERE))
    places = kept_places()
    matching = [row for shard in range(len(COUNTS)) for row in rows_of(shard) if is_kept(row)]
    absent = sum(row["status"] != "success" for row in matching)
    assert absent
    assert (built.samples, built.kept, built.matched, built.absent, built.without_row) == (
        sum(COUNTS), len(places), len(matching), absent, 0,
    )  # fmt: skip
    whole, view = open_source("a", root), open_source("a", root, "good")
    assert view.fingerprint == built.fingerprint != whole.fingerprint
    assert (view.view, view.samples, view.counted_by) == ("good", len(places), whole.counted_by)
    assert view.tar_counts.tolist() == whole.counts.tolist() == COUNTS
    at = np.array([(s, k) for s, n in enumerate(view.counts.tolist()) for k in range(n)])
    found = view.tar_positions(at[:, 0], at[:, 1])
    assert list(zip(at[:, 0].tolist(), found.tolist(), strict=True)) == places
    reader = ShardReader(view)
    assert [reader.key(*place) for place in places] == [f"{s:05d}{i:04d}" for s, i in places]
    assert whole.tar_positions(at[:, 0], at[:, 1]).tolist() == at[:, 1].tolist()


def test_training_visits_each_kept_sample_once_and_unchanged(root: str, tmp_path: Path) -> None:
    """An epoch visits each kept sample once; ids, masks, crops and digests of a sample do not depend on the view."""
    build_view(root, "good", Rule(where=WHERE))
    places = kept_places()
    spec = pairs(tmp_path, batch=len(places), a=SourceSpec(root, view="good"))
    batch = BatchBuilder(spec).make(0, 0, len(places))
    whole = BatchBuilder(pairs(tmp_path, batch=sum(COUNTS), a=SourceSpec(root)))
    first = whole.make(0, 0, sum(COUNTS))
    order = whole.order.refs(0, 0, sum(COUNTS))
    row = {(int(s), int(i)): n for n, (s, i) in enumerate(zip(order.shard, order.index, strict=True))}
    theirs = {int(first.sample_ids[row[place]]): row[place] for place in places}
    assert sorted(batch.sample_ids.tolist()) == sorted(theirs)
    for number, sample in enumerate(batch.sample_ids.tolist()):
        assert batch.row_keys[number] == first.row_keys[theirs[sample]]
        assert (batch.pixels[number] == first.pixels[theirs[sample]]).all()  # type: ignore[index]
    reads = {(int(s), int(k)) for s, k in zip(*_drawn(spec), strict=True)}
    assert reads != set(places)  # the order draws indices among the kept samples


def test_of_a_store_the_unit_of_a_kept_sample_is_fetched(root: str, tmp_path: Path) -> None:
    build_index(root)
    build_view(root, "good", Rule(where=WHERE))
    source = open_source("a", root, "good")
    cache = CacheSettings(str(tmp_path / "cache"), 1)  # so small that a unit is one sample
    shards = RemoteShards(source, Offsets(source), cache)
    for shard, index in kept_places():
        unit = shards._unit(shard, index)
        starts = scan_file(f"{root}/{shard:05d}.tar").starts
        assert [unit.start, unit.stop] == starts[index : index + 2].tolist()
    shards.close()


def _drawn(spec: Any) -> tuple[np.ndarray, np.ndarray]:
    refs = BatchBuilder(spec).order.refs(0, 0, spec.batch)
    return refs.shard, refs.index


def test_replacement_samples_are_kept_samples(root: str, tmp_path: Path) -> None:
    places = kept_places()
    broken = [place for place in places if place[0] == 3][::2]
    with TarWriter(f"{root}/00003.tar") as tar:
        for index in range(COUNTS[3]):
            content = members(3, index) | ({"png": b"none"} if (3, index) in broken else {})
            tar.write(f"00003{index:04d}", content)
    build_view(root, "good", Rule(where=WHERE))
    spec = pairs(tmp_path, batch=len(places), a=SourceSpec(root, view="good"))
    batch = BatchBuilder(spec).make(0, 0, len(places))
    assert batch.skipped["a"]["undecodable"] == len(broken)
    keys = {f"{s:05d}{i:04d}" for s, i in broken}
    assert {bad["key"] for bad in batch.bad} == keys
    whole = BatchBuilder(pairs(tmp_path, batch=sum(COUNTS), a=SourceSpec(root)))
    from data_pipeline.order.stream_order import sample_ids

    good = [place for place in places if place not in broken]
    ids = {int(sample_ids("a", np.array([s]), np.array([i]))[0]) for s, i in good}
    assert set(batch.sample_ids.tolist()) <= ids
    whole.close()


def test_evaluation_reads_the_kept_samples_in_order(root: str, tmp_path: Path) -> None:
    build_view(root, "good", Rule(where=WHERE))
    builder = EvaluationPass(pairs(tmp_path, batch=4, a=SourceSpec(root, view="good")))
    builder.check()
    metas = [meta for n in range(len(builder)) for meta in builder.make(n, 0, 4).meta or []]
    assert [m["key"] for m in metas if m["key"]] == [f"{s:05d}{i:04d}" for s, i in kept_places()]


def test_ids_in_every_file_format(root: str, tmp_path: Path) -> None:
    places = kept_places()
    keys = [f"{s:05d}{i:04d}" for s, i in places]
    listed = [*keys, keys[0], "999999999", "nowhere"]
    (tmp_path / "ids.txt").write_text("\n".join(listed) + "\n\n")
    np.save(tmp_path / "ids.npy", np.array(listed))
    parquet.write_table(pa.table({"key": listed, "other": listed}), tmp_path / "ids.parquet")
    uids = [(s, i) for s, i in places]
    np.save(tmp_path / "uids.npy", np.array([*uids, (9, 9)], dtype="u8,u8"))
    built = []
    for number, name in enumerate(("ids.txt", "ids.npy", "ids.parquet")):
        one = build_view(root, f"v{number}", Rule(ids=str(tmp_path / name)))
        assert (one.kept, one.matched, one.absent) == (len(keys), len(keys) + 2, 2)
        built.append(one.fingerprint)
    one = build_view(root, "v3", Rule(ids=str(tmp_path / "uids.npy"), column="uid"))
    assert (one.kept, one.matched, one.absent) == (len(keys), len(keys) + 1, 1)
    built.append(one.fingerprint)
    build_view(root, "v4", Rule(where=WHERE))
    built.append(open_source("a", root, "v4").fingerprint)
    assert len(set(built)) == 1  # the fingerprint depends on the samples, not on how they were selected
    for name, content in (("empty.txt", b"\n"), ("objects.npy", pickle.dumps([1]))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            build_view(root, "bad", Rule(ids=str(tmp_path / name)))


def test_local_remote_and_parallel_builds_give_the_same_view(
    s3: str, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = build_view(root, "good", Rule(where=WHERE))
    monkeypatch.setattr(parallel, "MIN_BYTES_PER_PROCESS", 1)
    assert build_view(root, "good", Rule(where=WHERE), jobs=2) == here
    remote = write_source(f"{s3}/{tmp_path.name}")
    assert build_view(remote, "good", Rule(where=WHERE)) == here
    view = open_source("a", remote, "good")
    assert view.fingerprint == here.fingerprint
    shard = int(np.flatnonzero(view.counts)[0])
    assert view.tar_position(shard, 0) == open_source("a", root, "good").tar_position(shard, 0)


def test_building_a_view_again_replaces_it(root: str) -> None:
    build_view(root, "good", Rule(where=WHERE))
    old = open_source("a", root, "good")
    assert build_view(root, "good", Rule(where="width > 0")).kept == sum(COUNTS)
    assert old.fingerprint != open_source("a", root, "good").fingerprint
    assert len(os.listdir(f"{root}/_index/views")) == 2


def test_a_view_that_does_not_match_the_source_is_refused(root: str) -> None:
    build_view(root, "good", Rule(where=WHERE))
    assert open_source("a", f"{root}/{{00000,00003}}.tar", "good").samples <= len(kept_places())
    with pytest.raises(UserError, match=r"source 'a': there is no view 'other'.*dromos data view"):
        open_source("a", root, "other")
    with pytest.raises(UserError, match="is not a valid view name"):
        open_source("a", root, "../../good")
    with TarWriter(f"{root}/00000.tar") as tar:
        for index in range(COUNTS[0] - 1):
            tar.write(f"00000{index:04d}", members(0, index))
    with pytest.raises(UserError, match=r"00000\.tar has 6 samples in .* had 7 in .* view 'good' was built"):
        open_source("a", root, "good")
    shutil.copy(f"{root}/00003.tar", f"{root}/00009.tar")
    with pytest.raises(UserError, match=r"does not contain 00009\.tar"):
        open_source("a", root, "good")


def test_a_view_with_a_flipped_bit_is_refused_or_correct(root: str) -> None:
    build_view(root, "good", Rule(where=WHERE))
    view = open_source("a", root, "good")
    at = np.array([(s, k) for s, n in enumerate(view.counts.tolist()) for k in range(n)])
    want = view.counts.tolist(), view.tar_positions(at[:, 0], at[:, 1]).tolist()
    random = np.random.default_rng(0)
    refused = 0
    for path in sorted(Path(root, "_index/views").iterdir()):
        whole = path.read_bytes()
        for _ in range(100):
            data = bytearray(whole)
            data[random.integers(len(data))] ^= 1 << random.integers(8)
            path.write_bytes(data)
            try:
                found = open_source("a", root, "good")
            except UserError:
                refused += 1
            else:
                assert (found.counts.tolist(), found.tar_positions(at[:, 0], at[:, 1]).tolist()) == want
        path.write_bytes(whole)
    assert refused > 100


@pytest.mark.parametrize("victim", [".bits", ".parquet"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_view_is_refused(root: str, victim: str, damage: str) -> None:
    build_view(root, "good", Rule(where=WHERE))
    path = next(Path(root, "_index/views").glob(f"*{victim}"))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 255
    path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    if damage == "gone":
        path.unlink()
    with pytest.raises(UserError, match=r"good.*dromos data view"):
        open_source("a", root, "good")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"where": "similarity > 5"}, r"similarity > 5 keeps none of the 38 samples .*\(0 matched\)"),
        ({"where": "similarty > 5"}, r"00000\.parquet: there is no column 'similarty'.*similarity"),
        ({"where": "key > 5"}, r"00000\.parquet: .*key is string"),
        ({"where": "similarity >"}, "ends too early"),
        ({}, "either a filter"),
        ({"where": "true", "column": "uid"}, "needs --ids"),
    ],
)
def test_invalid_rules_are_named(root: str, rule: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_view(root, "good", Rule(**rule))
    assert not os.path.exists(f"{root}/_index")


def test_missing_and_damaged_parquet_files_are_named(root: str) -> None:
    os.unlink(f"{root}/00003.parquet")
    with pytest.raises(UserError, match=r"1 of the 4 tars have no parquet file beside them.*00003\.parquet"):
        build_view(root, "good", Rule(where=WHERE))
    Path(f"{root}/00003.parquet").write_bytes(b"PAR1 junk")
    with pytest.raises(UserError, match=r"00003\.parquet is not a parquet file"):
        build_view(root, "good", Rule(where=WHERE))
