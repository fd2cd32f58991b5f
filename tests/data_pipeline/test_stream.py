"""Stream with any workers, ranks and resumes against one uninterrupted run; epochs against a full count."""

from __future__ import annotations

import json
import signal
import tempfile
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline import ImageSpec, SourceSpec, Stream, TextSpec, UserError
from data_pipeline.batches import row_builder
from data_pipeline.batches.spec import Batch
from data_pipeline.errors import ReadError
from tests.support.samples import LENGTH, SIZE, write_packed, write_source, write_tokenizer

SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


def open_stream(root: Path, **options: object) -> Stream:
    if not (root / "a").exists():
        write_source(root / "a", [5, 6])
        write_tokenizer(root / "tokenizer")
    settings: dict = {"batch": 4, "seed": 9, "image": ImageSpec(SIZE), **options}
    return Stream(str(root / "a"), text=TextSpec(str(root / "tokenizer"), LENGTH), **settings)


def test_stream_resumes_on_another_world_size(tmp_path: Path) -> None:
    with open_stream(tmp_path) as stream:
        want = [next(stream) for _ in range(8)]
    with open_stream(tmp_path, workers=1) as stream:
        for batch in stream:
            assert batch.batch_digest == want[batch.step].batch_digest
            if stream.step == 3:
                break
        saved = json.loads(json.dumps(stream.state()))
        assert next(stream).step == 3
        stream.resume(saved)
        assert next(stream).step == 3
    halves = [open_stream(tmp_path, rank=rank, world_size=2) for rank in (0, 1)]
    for stream in halves:
        stream.resume(saved)
    for step in range(3, 8):
        parts = [next(stream) for stream in halves]
        tokens = np.concatenate([part.tokens for part in parts])
        np.testing.assert_array_equal(tokens, want[step].tokens)
        assert sum(part.batch_digest for part in parts) % 2**64 == want[step].batch_digest
    for stream in halves:
        stream.close()


def test_stream_refuses_a_state_of_other_data(tmp_path: Path) -> None:
    with open_stream(tmp_path) as stream:
        saved = stream.state()
        with pytest.raises(UserError, match="'other'"):
            stream.resume({**saved, "stream": "other"})
    with open_stream(tmp_path, seed=10) as stream, pytest.raises(UserError, match="seed changed from"):
        stream.resume(saved)
    write_source(tmp_path / "a", [5, 7])
    with open_stream(tmp_path) as stream, pytest.raises(UserError, match="fingerprint"):
        stream.resume(saved)


def test_stream_ends_when_its_sources_do(tmp_path: Path) -> None:
    source = write_packed(tmp_path / "packed", [8])
    with Stream({"t": SourceSpec(str(source), max_epochs=2)}, 4, length=LENGTH) as stream:
        ids = np.concatenate([batch.sample_ids for batch in stream])
    assert len(ids) == 16
    np.testing.assert_array_equal(np.unique(ids, return_counts=True)[1], [2] * 8)


def row_contents(batch: Batch) -> list[tuple[Any, ...]]:
    """Everything in a batch, as one comparable tuple per row."""
    pixels = batch.tokens if batch.pixels is None else batch.pixels
    return [
        (int(batch.sample_ids[i]), int(batch.row_keys[i]), batch.tokens[i].tobytes(), pixels[i].tobytes())
        for i in range(batch.stop - batch.start)
    ]


@st.composite
def mixtures(draw: st.DrawFn) -> dict[str, tuple[list[int], float | None]]:
    """Source -> (samples by shard, weight); some shards are empty or have one sample."""
    counts = st.lists(st.sampled_from([0, 1, 1, 2, 5, 9, 17]), min_size=1, max_size=5).filter(any)
    weights = st.sampled_from([None, None, 1.0, 2.5])
    names = draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True))
    weighted = draw(st.booleans())
    return {name: (draw(counts), (draw(weights) or 1.0) if weighted else None) for name in sorted(names)}


def check_any_way(data: st.DataObject, workers: st.SearchStrategy[int]) -> None:
    """Compare a stream whose ranks and workers change at random steps with an uninterrupted one.

    The first and the last rank have `workers` processes. The ranks between them have none, because a start is slow.
    """
    mixture = data.draw(mixtures())
    world_sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=3))
    batch = 12 * data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=len(world_sizes), max_size=len(world_sizes)))
    seed = data.draw(st.integers(0, 9))
    with tempfile.TemporaryDirectory() as root:
        named = {
            name: SourceSpec(str(write_packed(Path(root) / name, counts)), weight)
            for name, (counts, weight) in mixture.items()
        }

        def opened(**given: Any) -> Stream:
            return Stream(named, batch, length=LENGTH, seed=seed, lanes=data_lanes, **given)

        data_lanes = data.draw(st.sampled_from([None, 1, 3, 12]))
        with opened() as stream:
            truth = [next(stream) for _ in range(sum(lengths))]
        saved, step = None, 0
        for world_size, length in zip(world_sizes, lengths, strict=True):
            states = []
            found: list[list[Batch]] = [[] for _ in range(length)]
            for rank in range(world_size):
                processes = data.draw(workers) if rank in (0, world_size - 1) else 0
                with opened(rank=rank, world_size=world_size, workers=processes) as stream:
                    if saved is not None:
                        stream.resume(json.loads(json.dumps(saved)))
                    assert stream.step == step
                    for each in found:
                        each.append(next(stream))
                    states.append(stream.state())
            assert all(state == states[0] for state in states)
            for parts, whole in zip(found, truth[step : step + length], strict=True):
                assert [row for part in parts for row in row_contents(part)] == row_contents(whole)
                for digest in ("batch_digest", "order_digest"):
                    assert sum(getattr(part, digest) for part in parts) % 2**64 == getattr(whole, digest)
            saved, step = states[0], step + length


@settings(max_examples=25, **SLOW)
@given(st.data())
def test_ranks_and_resumes_do_not_change_the_stream(data: st.DataObject) -> None:
    check_any_way(data, st.just(0))


@settings(max_examples=4, **SLOW)
@given(st.data())
def test_workers_do_not_change_the_stream(data: st.DataObject) -> None:
    check_any_way(data, st.integers(1, 4))


@settings(max_examples=30, **SLOW)
@given(
    counts=st.lists(st.sampled_from([0, 1, 2, 7, 30]), min_size=1, max_size=6).filter(any),
    batch=st.integers(1, 9),
    epochs=st.integers(1, 3),
    lanes=st.booleans(),
)
def test_each_epoch_visits_every_sample_once(counts: list[int], batch: int, epochs: int, lanes: bool) -> None:
    """Samples are identified by their tokens, shard * 1000 + index. Lanes end an epoch at different steps."""
    served: dict[int, Counter[int]] = {epoch: Counter() for epoch in range(epochs)}
    with tempfile.TemporaryDirectory() as root:
        source = str(write_packed(Path(root) / "t", counts))
        with Stream(source, batch, length=LENGTH, lanes=1 if lanes else None) as stream:
            for each in stream:
                refs = stream.order.refs(each.step)
                for epoch, row in zip(refs.epoch.tolist(), each.tokens, strict=True):
                    served.setdefault(epoch, Counter())[int(row[0])] += 1
                if min(refs.epoch) >= epochs:
                    break
    samples = [shard * 1000 + index for shard, count in enumerate(counts) for index in range(count)]
    for epoch in range(epochs):
        assert served[epoch] == Counter(samples)


def test_images_are_the_same_from_any_number_of_workers(tmp_path: Path) -> None:
    """With unusable samples, and a resume in the middle of an epoch with another number of workers."""
    broken = {(0, i): {"png": b"no picture", "txt": b"a"} for i in (1, 2)}
    write_source(tmp_path / "a", [5, 6], broken)
    write_tokenizer(tmp_path / "tokenizer")
    with open_stream(tmp_path, batch=8) as stream:
        truth = [next(stream) for _ in range(6)]
    assert any(batch.skipped for batch in truth)
    for workers in (1, 3):  # check_any_way draws the other numbers
        with open_stream(tmp_path, batch=8, workers=workers) as stream:
            stream.resume({**stream.state(), "step": workers})
            for want in truth[workers:]:
                batch = next(stream)
                assert row_contents(batch) == row_contents(want)
                assert (batch.skipped, batch.bad, batch.samples) == (want.skipped, want.bad, want.samples)
                assert batch.batch_digest == want.batch_digest


def test_a_stream_that_could_not_read_tries_the_same_batch_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_builder, "RETRY_AFTER", (0.0,))
    source = write_packed(tmp_path / "t", [4, 4])
    with Stream(str(source), 8, length=LENGTH) as stream:
        want = [next(stream).batch_digest for _ in range(3)]
    with Stream(str(source), 8, length=LENGTH) as stream:
        away = (source / "00001.tar").rename(tmp_path / "away")
        for _ in range(2):
            with pytest.raises(ReadError, match=r"00001\.tar"):
                next(stream)
            assert stream.state()["step"] == 0
        away.rename(source / "00001.tar")
        assert [next(stream).batch_digest for _ in range(3)] == want


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_goes_on_after_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """As in a notebook: the loop is interrupted while it waits, then started again."""
    source = write_packed(tmp_path / "t", [4, 4])
    with Stream(str(source), 8, length=LENGTH) as stream:
        want = [next(stream).batch_digest for _ in range(3)]
    with Stream(str(source), 8, length=LENGTH, workers=workers) as stream:
        found = [next(stream).batch_digest]
        with monkeypatch.context() as patch:
            patch.setattr(stream._loader._pool, "result", lambda ticket: signal.raise_signal(signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                next(stream)
        assert stream.step == 1
        found += [batch.batch_digest for batch in islice(stream, 2)]
    assert found == want


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image": ImageSpec(0)}, r"image\.size is 0; it must be at least 1 pixel"),
        (
            {"image": ImageSpec(SIZE, crop=(0.9, 0.2))},
            r"image\.crop is \(0\.9, 0\.2\).* 0 < low <= high <= 1",
        ),
        ({"image": ImageSpec(SIZE, crop=(0.5, 1.5))}, r"image\.crop is \(0\.5, 1\.5\)"),
        ({"image": ImageSpec(SIZE, max_pixels=0)}, r"image\.max_pixels is 0"),
        ({"text": TextSpec("clip-bpe", 2)}, r"text\.length is 2; .* at least 3"),
        ({"length": 0}, r"stream\.text\.length is 0; it must be at least 1 token"),
        ({"length": LENGTH, "share_by": "root"}, r"share_by is 'root'; write one of size, sqrt"),
        ({"length": LENGTH, "workers": -1}, r"loader\.workers.* is -1; .* 0 for a thread"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_decoded(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    source = write_packed(tmp_path / "t", [4])
    with pytest.raises(UserError, match=words):
        Stream(str(source), 4, **options)


def test_workers_end_with_a_stream_that_nobody_closed(tmp_path: Path) -> None:
    source = write_packed(tmp_path / "t", [4, 4])
    stream = Stream(str(source), 8, length=LENGTH, workers=1)
    kept = next(stream).tokens
    (worker,) = stream._loader.worker_pids
    del stream
    assert not Path(f"/proc/{worker}").exists()
    assert kept.shape == (8, LENGTH)
