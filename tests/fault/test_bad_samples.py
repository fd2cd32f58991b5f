"""Unusable samples are replaced by rule and counted; I/O errors are retried, then stop the run."""

from __future__ import annotations

import dataclasses
import errno
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.batches import row_builder
from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.spec import Batch, SourceSpec, StreamSpec
from data_pipeline.errors import ContentError, ReadError, UserError
from data_pipeline.loader.loader import LocalLoader
from data_pipeline.order import digest
from data_pipeline.order.stream_order import row_keys, sample_ids
from data_pipeline.sources.shard_reader import ShardReader
from data_pipeline.transforms.text_formats import PackedFormat
from tests.data_pipeline.transforms.test_every_image import png
from tests.support.samples import LENGTH, encode, members, pairs, pixels, write_packed, write_source

COUNTS = [6, 10, 5, 3]
GOOD_TEXT = {"txt": b"a red dot"}
BAD = {
    (0, 1): ({"png": b"no image", **GOOD_TEXT}, "undecodable"),
    (0, 4): ({**GOOD_TEXT, "json": b"{}"}, "missing image"),
    (1, 0): ({"png": encode(pixels(0, 0))}, "missing caption"),
    (1, 7): (
        {"png": png((6000, 6000, 8, 2), (b"IDAT", zlib.compress(bytes(99)))), **GOOD_TEXT},
        "too many pixels",
    ),
    (1, 8): ({"png": members(1, 8)["png"][:300], **GOOD_TEXT}, "undecodable"),
    # All of shard 3: the eight attempts within the shard fail, the attempts in the whole source succeed.
    **{(3, i): ({"png": b"no image", **GOOD_TEXT}, "undecodable") for i in range(3)},
}
STEPS = 8
BATCH = 12


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> StreamSpec:
    root = tmp_path_factory.mktemp("bad")
    source = write_source(root / "mixed", COUNTS, {place: given for place, (given, _) in BAD.items()})
    return pairs(root, batch=BATCH, mixed=source)


def test_replacement_is_the_rule_and_every_one_is_counted(spec: StreamSpec) -> None:
    """Brute force: replay the attempts, knowing which samples are bad."""
    builder = BatchBuilder(spec)
    seen: Counter[str] = Counter()
    for step in range(STEPS):
        batch = builder.make(step, 0, BATCH)
        refs = builder.order.refs(step)
        counted: Counter[str] = Counter()
        lines = []
        for i in range(BATCH):
            assigned = place = (int(refs.shard[i]), int(refs.index[i]))
            epoch, attempt = int(refs.epoch[i]), 0
            while place in BAD:
                counted[BAD[place][1]] += attempt == 0  # a row counts once, for the sample assigned to it
                lines.append((i, epoch, attempt, "{:05d}{:04d}".format(*place), BAD[place][1]))
                attempt += 1
                place = builder.order.replacement(0, *assigned, epoch, attempt)
            arrays = [np.array([v]) for v in (*place, epoch)]
            assert batch.sample_ids[i] == sample_ids("mixed", *arrays[:2])[0]
            assert batch.row_keys[i] == row_keys(spec.seed, "mixed", *arrays, attempt)[0]
        counted = +counted
        assert batch.skipped == ({"mixed": dict(counted)} if counted else {})
        named = ("row", "epoch", "attempt", "key", "reason")
        assert [tuple(line[name] for name in named) for line in batch.bad] == lines
        for line in batch.bad:
            assert line["source"] == "mixed"
            assert line["step"] == step
            assert line["url"].endswith(f"mixed/{line['key'][:5]}.tar")
        assert batch.samples == {"mixed": BATCH}
        seen += counted
    assert set(seen) == {"undecodable", "missing image", "missing caption", "too many pixels"}


def test_order_digest_ignores_content_and_batch_digest_does_not(spec: StreamSpec, tmp_path: Path) -> None:
    clean = dataclasses.replace(
        spec, sources={"mixed": SourceSpec(str(write_source(tmp_path / "m", COUNTS)))}
    )
    differs = 0
    for step in range(STEPS):
        bad, good = BatchBuilder(spec).make(step, 0, BATCH), BatchBuilder(clean).make(step, 0, BATCH)
        assert bad.order_digest == good.order_digest
        assert (bad.batch_digest != good.batch_digest) == bool(bad.skipped)
        differs += bool(bad.skipped)
    assert differs > 0


def totals(batches: list[Batch]) -> tuple[int, int, Counter[str], list[dict[str, Any]]]:
    served = assigned = 0
    skipped: Counter[str] = Counter()
    for batch in batches:
        served, assigned = digest.add(served, batch.batch_digest), digest.add(assigned, batch.order_digest)
        skipped.update(batch.skipped.get("mixed", {}))
    return served, assigned, skipped, [line for batch in batches for line in batch.bad]


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (3, 0), (4, 1)])
def test_ranks_and_workers_do_not_change_what_is_replaced(
    spec: StreamSpec, world_size: int, workers: int
) -> None:
    want = [totals([BatchBuilder(spec).make(step, 0, BATCH)]) for step in range(4)]
    loaders = [LocalLoader([spec], rank, world_size, workers) for rank in range(world_size)]
    try:
        for step, steps in enumerate(zip(*(loader.steps(0, 4) for loader in loaders), strict=True)):
            assert totals([batch for part in steps for batch in part["pairs"]]) == want[step]
    finally:
        for loader in loaders:
            loader.close()


def test_a_source_without_images_is_one_message(tmp_path: Path) -> None:
    bare = {(s, i): {"txt": b"a red dot", "json": b"{}"} for s, n in enumerate([4, 3]) for i in range(n)}
    spec = pairs(tmp_path, batch=4, bare=write_source(tmp_path / "bare", [4, 3], bare))
    with pytest.raises(UserError) as opened:
        LocalLoader([spec], 0, 1, 0)
    # Without the check at opening, the first step raises it.
    with pytest.raises(UserError) as served:
        BatchBuilder(spec).make(0, 0, 4)
    for error in (opened, served):
        text = str(error.value)
        for part in ("data.pairs.sources.bare", ".tar", "missing image", "json, txt", "jpg, jpeg, png"):
            assert part in text


def test_a_packed_stream_on_pairs_names_the_expected_members(tmp_path: Path) -> None:
    source = write_source(tmp_path / "pairs", [3])
    spec = StreamSpec("text", 0, {"a": SourceSpec(str(source))}, batch=2, text=PackedFormat(LENGTH))
    with pytest.raises(
        UserError, match=r"missing tokens.*Expected of every sample: npy with 8 packed tokens"
    ):
        BatchBuilder(spec).check()


def test_bad_first_samples_do_not_fail_a_source(tmp_path: Path) -> None:
    source = write_source(tmp_path / "a", [4], {(0, 0): {"txt": b"a"}, (0, 1): {"txt": b"a"}})
    BatchBuilder(pairs(tmp_path, batch=4, a=source)).check()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_builder, "RETRY_AFTER", (0.0, 0.0))


@pytest.mark.parametrize("code", [errno.EIO, errno.ECONNRESET, errno.ETIMEDOUT, errno.ENOENT, errno.EACCES])
def test_an_io_error_is_retried_and_changes_nothing(
    spec: StreamSpec, hurried: None, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    want = BatchBuilder(spec).make(0, 0, BATCH)
    read, calls = ShardReader.read, Counter()

    def flaky(self: ShardReader, shard: int, index: int) -> tuple[str, dict[str, bytes]]:
        calls[shard, index] += 1
        if calls[shard, index] % 3:
            raise OSError(code, "no luck")
        return read(self, shard, index)

    monkeypatch.setattr(ShardReader, "read", flaky)
    found = BatchBuilder(spec).make(0, 0, BATCH)
    assert found.batch_digest == want.batch_digest
    assert found.skipped == want.skipped


def test_lasting_io_errors_stop_with_the_url(
    spec: StreamSpec, hurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: ShardReader, shard: int, index: int) -> tuple[str, dict[str, bytes]]:
        raise ConnectionResetError(errno.ECONNRESET, "reset by peer")

    builder = BatchBuilder(spec)
    monkeypatch.setattr(ShardReader, "read", broken)
    with pytest.raises(
        ReadError, match=r"mixed/0000\d\.tar, sample \d+: not readable after 3 tries.*reset by peer"
    ):
        builder.make(0, 0, BATCH)


def test_a_deleted_shard_stops_the_run(tmp_path: Path, hurried: None) -> None:
    source = write_packed(tmp_path / "packed", [3, 3])
    builder = BatchBuilder(
        StreamSpec("text", 0, {"a": SourceSpec(str(source))}, batch=6, text=PackedFormat(LENGTH))
    )
    (source / "00001.tar").unlink()
    with pytest.raises(ReadError, match=r"00001\.tar.*No such file"):
        builder.make(0, 0, 6)


def test_errors_survive_pickling() -> None:
    import pickle

    for error in (ContentError("missing image", "txt"), ReadError("gone"), UserError("wrong")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))
