"""Byte ranges of samples against tarfile's offsets: from the index and added, both widths, single and vectorised."""

from __future__ import annotations

import os
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from data_pipeline.index.build import build_index
from data_pipeline.sources.manifest import Manifest, open_source
from data_pipeline.sources.offset_file import GROUP, OffsetFile, block_bytes, check_of, pack_starts
from data_pipeline.sources.offsets import Offsets
from data_pipeline.sources.shard_reader import ShardReader
from data_pipeline.sources.tar import parse_sample
from tests.support.tars import FORMATS, Entry, entries, truth, write_entries


@settings(max_examples=60, deadline=None)
@given(st.lists(entries(), min_size=1, max_size=3), st.sampled_from(FORMATS), st.booleans())
def test_spans_agree_with_tarfile(shards: list[list[Entry]], form: int, indexed: bool) -> None:
    """Spans begin at tarfile's first header of a sample, tile the tar, and parse to what tarfile extracts."""
    with tempfile.TemporaryDirectory() as folder:
        want = []
        for number, content in enumerate(shards):
            try:
                want.append(truth(write_entries(Path(folder) / f"{number}.tar", content, form)))
            except ValueError:
                return  # the ustar format has no names this long
        if not any(want):
            return
        if indexed:
            build_index(folder)
        manifest = open_source("a", folder)
        assert (manifest.offsets is not None) == indexed
        reader = ShardReader(manifest)
        assert manifest.counts.tolist() == [len(samples) for samples in want]
        for shard, samples in enumerate(want):
            data = (Path(folder) / f"{shard}.tar").read_bytes()
            for index, (key, first, members) in enumerate(samples):
                assert reader.read(shard, index) == (key, members)
                start, stop = reader.offsets.range(shard, index)
                assert start == first
                if index + 1 < len(samples):
                    assert stop == samples[index + 1][1]
                sample = parse_sample(data[start:stop], "x")
                assert {e: data[start + o : start + o + n] for e, (o, n) in sample.members.items()} == members
        places = [(shard, index) for shard, samples in enumerate(want) for index in range(len(samples))]
        at = np.array(places)
        starts, stops = reader.offsets.ranges(at[:, 0], at[:, 1])
        assert list(zip(starts.tolist(), stops.tolist(), strict=True)) == [
            reader.offsets.range(*place) for place in places
        ]
        reader.close()


def offsets_of(folder: Path, shards: list[np.ndarray]) -> Offsets:
    """Offsets of the given starts, written to an offset file."""
    packed = [pack_starts(starts) for starts in shards]
    for starts, (block, width) in zip(shards, packed, strict=True):
        assert len(block) == block_bytes(len(starts) - 1, width)
    lengths = np.array([len(block) for block, _ in packed])
    path = folder / "offsets.bin"
    path.write_bytes(b"".join(block for block, _ in packed))
    counts = np.array([len(starts) - 1 for starts in shards], np.int64)
    file = OffsetFile(
        str(path),
        np.cumsum(lengths) - lengths,
        np.array([width for _, width in packed], np.uint8),
        np.array([check_of(b, int(n)) for (b, _), n in zip(packed, counts, strict=True)], np.uint64),
    )
    names = [f"{n}.tar" for n in range(len(shards))]
    return Offsets(Manifest("a", str(folder), names, counts, counts, "manifest", "", offsets=file))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_lookups_return_the_packed_starts(data: st.DataObject) -> None:
    """Random gaps, so that some shards need wide entries; single, vectorised and added lookups agree."""
    gap = st.sampled_from([1, 2, 3, 1000, 65535, 65536, 2**26])
    shards = []
    for _ in range(data.draw(st.integers(1, 4))):
        steps = data.draw(st.lists(gap, max_size=3 * GROUP))
        shards.append(np.cumsum([data.draw(st.integers(0, 9)), *steps], dtype=np.int64) * 512)
    places = [(s, i) for s, starts in enumerate(shards) for i in range(len(starts) - 1)]
    if not places:
        return
    with tempfile.TemporaryDirectory() as folder:
        offsets = offsets_of(Path(folder), shards)
        at = np.array(data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=200)))
        want = np.array([(shards[s][i], shards[s][i + 1]) for s, i in at])
        for _ in range(2):
            start, stop = offsets.ranges(at[:, 0], at[:, 1])
            assert start.dtype == stop.dtype == np.int64
            assert start.tolist() == want[:, 0].tolist()
            assert stop.tolist() == want[:, 1].tolist()
            assert [offsets.range(int(s), int(i)) for s, i in at] == [tuple(w) for w in want.tolist()]
            square = offsets.ranges(at[:, :1], at[:, 1])[0] if len(set(at[:, 0])) == 1 else None
            assert square is None or (square == start).all()
            for shard, starts in enumerate(shards):
                if data.draw(st.booleans()):
                    offsets.add(shard, starts)


def test_width_is_chosen_by_the_widest_group() -> None:
    narrow = np.arange(0, 65535 + 1, 65535 // 63)[:64] * 512
    assert pack_starts(np.array([0, 65535 * 512]))[1] == 2
    assert pack_starts(np.array([0, 65536 * 512]))[1] == 4
    assert pack_starts(np.concatenate([narrow, [narrow[-1] + 2**25]]))[1] == 2  # in the next group
    with pytest.raises(UserError, match="2 TiB"):
        pack_starts(np.array([0, 2**41]))


def test_the_file_takes_two_bytes_per_sample() -> None:
    starts = np.arange(10_001, dtype=np.int64) * 110 * 1024
    assert len(pack_starts(starts)[0]) / 10_000 < 2.1


def test_a_group_over_32_mib_in_a_real_tar(tmp_path: Path) -> None:
    """5 members of 20 MiB in a sparse file: their content is never written."""
    path = tmp_path / "00000.tar"
    with path.open("wb") as file:
        for number in range(5):
            info = tarfile.TarInfo(f"{number}.bin")
            info.size = 20 << 20
            file.write(info.tobuf())
            file.seek(info.size, os.SEEK_CUR)
        file.write(bytes(1024))
    build_index(str(tmp_path))
    manifest = open_source("a", str(tmp_path))
    assert manifest.offsets is not None
    assert manifest.offsets.widths.tolist() == [4]
    with tarfile.open(path) as tar:
        want = [member.offset for member in tar]
    start, stop = Offsets(manifest).ranges(np.zeros(5, np.int64), np.arange(5))
    assert start.tolist() == want
    assert stop.tolist() == [*want[1:], want[-1] + 512 + (20 << 20)]
    assert ShardReader(manifest).key(0, 4) == "4"


def test_missing_samples_and_unknown_shards_raise(tmp_path: Path) -> None:
    offsets = offsets_of(tmp_path, [np.array([0, 512, 1024]), np.array([0])])
    for shard, index in ((0, 2), (0, -1), (1, 0)):
        with pytest.raises(IndexError):
            offsets.range(shard, index)
        with pytest.raises(IndexError):
            offsets.ranges(np.array([0, shard]), np.array([0, index]))
    counts = np.array([3, 3], np.int64)
    bare = Offsets(Manifest("a", str(tmp_path), ["0.tar", "1.tar"], counts, counts, "tar", ""))
    assert not bare.has(0)
    bare.add(1, np.arange(4) * 512)
    assert [bare.has(0), bare.has(1)] == [False, True]
    assert bare.ranges(np.array([1]), np.array([2]))[1].tolist() == [1536]
    for call in (lambda: bare.range(0, 0), lambda: bare.ranges(np.array([1, 0]), np.array([0, 0]))):
        with pytest.raises(KeyError, match="has not been scanned yet"):
            call()


def test_a_damaged_block_is_never_used(tmp_path: Path) -> None:
    offsets = offsets_of(tmp_path, [np.arange(100) * 1024, np.arange(50) * 1024])
    path = tmp_path / "offsets.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    file = OffsetFile(str(path), offsets._blocks, offsets._widths, offsets._checks)  # type: ignore[arg-type]
    counts = np.array([99, 49], np.int64)
    damaged = Offsets(Manifest("a", "", ["0", "1"], counts, counts, "manifest", "", offsets=file))
    assert damaged.range(1, 3) == (3072, 4096)
    with pytest.raises(UserError, match=r"offsets\.bin is damaged.*dromos data index"):
        damaged.range(0, 3)


def test_lookups_are_vectorised(tmp_path: Path) -> None:
    """The number of Python and C calls, counted by a profiler, does not grow with the rows."""
    import sys

    shards = [np.arange(101, dtype=np.int64) * 2048 for _ in range(200)]
    offsets = offsets_of(tmp_path, shards)

    def calls(rows: int) -> int:
        seen = 0

        def count(frame: object, event: str, argument: object) -> None:
            nonlocal seen
            seen += event in ("call", "c_call")

        at = np.arange(rows)
        sys.setprofile(count)
        offsets.ranges(at % 200, at // 200 % 100)
        sys.setprofile(None)
        return seen

    assert calls(10_000) == calls(20)
    assert calls(160_000) < 20 * calls(20)  # several lookups of ROWS_PER_LOOKUP rows


def test_more_rows_than_one_lookup_keep_their_order(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    shards = [np.concatenate([[0], np.cumsum(random.randint(2, 900, 300))]) * 512 for _ in range(40)]
    offsets = offsets_of(tmp_path, shards)
    shard, index = random.randint(0, 40, (50, 1000)), random.randint(0, 300, (50, 1000))
    start, stop = offsets.ranges(shard, index)
    edges = np.stack(shards)
    assert np.array_equal(start, edges[shard, index])
    assert np.array_equal(stop, edges[shard, index + 1])
