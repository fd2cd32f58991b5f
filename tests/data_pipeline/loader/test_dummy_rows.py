"""Batches that ranks share unevenly: a rank has its rows of the global batch, then dummy rows without a sample."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import ImageSpec, SourceSpec, Stream, TextSpec
from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.batches.evaluation_pass import EvaluationPass
from data_pipeline.batches.spec import Batch, StreamSpec
from data_pipeline.batches.work_items import items_of, largest_share, rows_of
from data_pipeline.loader.loader import Loader, LocalLoader
from data_pipeline.loader.prefetch_plan import PrefetchPlan
from data_pipeline.sources.shard_reader import ShardReader
from data_pipeline.transforms.text_formats import PackedFormat
from data_pipeline.transforms.tokenizers import load_tokenizer
from data_pipeline.workers.thread_pool import ThreadPool
from tests.support.samples import LENGTH, SIZE, pairs, write_packed, write_source

STEPS = 4
ROW_FIELDS = ("tokens", "used", "weights", "sample_ids", "row_keys")


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> list[StreamSpec]:
    """Pairs in 7 rows, then 3, in 1 lane; packed text in one row."""
    root = tmp_path_factory.mktemp("uneven")
    broken = {(0, 3): {"png": b"no image", "txt": b"a red dot"}}
    images = pairs(
        root, first=write_source(root / "first", [5, 9], broken), second=write_source(root / "second", [4])
    )
    packed = write_packed(root / "packed", [9, 6])
    return [
        dataclasses.replace(images, batch={0: 7, 2: 3}, lanes=1),
        StreamSpec("text", 4, {"t": SourceSpec(str(packed))}, batch=1, text=PackedFormat(LENGTH)),
    ]


@pytest.fixture(scope="module")
def truth(specs: list[StreamSpec]) -> list[dict[str, Batch]]:
    """Whole global batches."""
    builders = {spec.name: BatchBuilder(spec) for spec in specs}
    return [
        {name: b.make(step, 0, b.spec.rows(step)) for name, b in builders.items()} for step in range(STEPS)
    ]


@given(st.integers(1, 3000), st.integers(1, 70), st.one_of(st.none(), st.integers(1, 40)))
def test_the_rows_of_ranks_tile_the_batch(batch: int, world_size: int, micro_batch: int | None) -> None:
    """Ranks differ by at most one row; with dummy rows all have the micro-batches of the rank with most rows."""
    spec: Any = StreamSpec("pairs", 0, {"x": SourceSpec("x")}, batch=batch, text=PackedFormat(4))
    shares = [rows_of(rank, world_size, batch) for rank in range(world_size)]
    assert [row for start, stop in shares for row in range(start, stop)] == list(range(batch))
    sizes = [stop - start for start, stop in shares]
    assert max(sizes) == largest_share(world_size, batch) <= min(sizes) + 1
    for dummy_rows in (True, False):
        items = [
            list(items_of([spec], 0, rank, world_size, micro_batch, dummy_rows)) for rank in range(world_size)
        ]
        for of_rank, (start, stop) in zip(items, shares, strict=True):
            assert [row for item in of_rank for row in range(item.start, item.stop)] == list(
                range(start, stop)
            )
            filled = [item.stop - item.start + item.dummies for item in of_rank]
            whole = max(sizes) if dummy_rows else stop - start
            size = micro_batch or max(1, whole)
            assert filled == [min(size, whole - at) for at in range(0, max(1, whole), size)]
    if batch % world_size == 0:
        assert not any(item.dummies for of_rank in items for item in of_rank)


@pytest.mark.parametrize(
    ("world_size", "workers", "micro_batch"),
    [(2, 0, None), (2, 1, 2), (3, 0, 1), (4, 2, None), (9, 0, None), (9, 0, 5)],
)
def test_the_ranks_together_serve_the_batch_of_one_process(
    specs: list[StreamSpec],
    truth: list[dict[str, Batch]],
    world_size: int,
    workers: int,
    micro_batch: int | None,
) -> None:
    tokenizer = load_tokenizer(specs[0].text.tokenizer if specs[0].text else "")
    found = []
    for rank in range(world_size):
        with LocalLoader(specs, rank, world_size, workers, micro_batch) as loader:
            found.append(list(loader.steps(0, STEPS)))
    for step, wholes in enumerate(truth):
        for name, whole in wholes.items():
            parts = [batch for of_rank in found for batch in of_rank[step][name]]
            check_whole(parts, whole)
            of_ranks = [[len(batch.weights) for batch in of_rank[step][name]] for of_rank in found]
            assert all(sizes == of_ranks[0] for sizes in of_ranks)
            assert sum(of_ranks[0]) == -(-(whole.stop - whole.start) // world_size)
            for dummy in (row for batch in parts for row in dummy_rows(batch)):
                ids = [tokenizer.start_id, tokenizer.end_id] + [tokenizer.pad_id] * (LENGTH - 2)
                assert (dummy["tokens"].tolist(), dummy["used"]) == (
                    (ids, 2) if name == "pairs" else ([0] * LENGTH, 1)
                )
                assert (dummy["sample_ids"], dummy["row_keys"], dummy["pixels"].any()) == (0, 0, False)


def check_whole(parts: list[Batch], whole: Batch) -> None:
    """The rows of weight 1 of all ranks' batches are the rows of one batch, and so are counts and digests."""
    fields = (*ROW_FIELDS, "pixels") if whole.pixels is not None else ROW_FIELDS
    for field in fields:
        rows = [getattr(batch, field)[: batch.stop - batch.start] for batch in parts]
        np.testing.assert_array_equal(np.concatenate(rows), getattr(whole, field), err_msg=field)
        assert all(len(getattr(batch, field)) == len(batch.weights) for batch in parts)
    assert all(batch.weights[batch.stop - batch.start :].max(initial=0) == 0 for batch in parts)
    for digest in ("batch_digest", "order_digest"):
        assert sum(getattr(batch, digest) for batch in parts) % 2**64 == getattr(whole, digest)
    assert sum((Counter(batch.samples) for batch in parts), Counter()) == Counter(whole.samples)
    assert [line for batch in parts for line in batch.bad] == whole.bad


def dummy_rows(batch: Batch) -> Iterator[dict[str, Any]]:
    for row in range(batch.stop - batch.start, len(batch.weights)):
        pixels = np.zeros(0) if batch.pixels is None else batch.pixels[row]
        yield {field: getattr(batch, field)[row] for field in ROW_FIELDS} | {"pixels": pixels}


def test_nothing_is_read_for_dummy_rows(specs: list[StreamSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks together read the samples that one process reads, no sample twice."""
    reads: Counter[tuple[str, int, int]] = Counter()
    read = ShardReader.read

    def counted(reader: ShardReader, shard: int, index: int) -> Any:
        reads[reader.manifest.root, shard, index] += 1
        return read(reader, shard, index)

    monkeypatch.setattr(ShardReader, "read", counted)
    builders = {
        spec.name: BatchBuilder(spec) for spec in specs
    }  # given to the loader, which then checks no sample

    def served_by(world_size: int) -> Counter[tuple[str, int, int]]:
        reads.clear()
        for rank in range(world_size):
            with LocalLoader(specs, rank, world_size, 0, builders=builders) as loader:
                assert len(list(loader.steps(0, STEPS))) == STEPS
        return Counter(reads)

    alone = served_by(1)
    assert sum(alone.values()) >= 7 + 7 + 3 + 3 + STEPS
    for world_size in (2, 3, 4, 9):
        assert served_by(world_size) == alone


def test_a_rank_without_rows_plans_no_fetch(specs: list[StreamSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.loader.prefetch_plan.can_prefetch", lambda manifests: True)
    builder = BatchBuilder(specs[1])
    monkeypatch.setattr(builder, "units", lambda name: object())  # none of its methods may be called
    plan = PrefetchPlan([builder], rank=0, world_size=2, limit_bytes=1 << 20, first=0)
    group = plan.next_group(0, STEPS)
    assert group is not None
    plan.plan_step(group)
    assert plan.next_fetch() is None


class PoolAsRay(Loader):
    """RayLoader's part of the work, with a pool that records what it is asked for."""

    def _open_pool(self) -> ThreadPool:
        self.submitted: list[tuple[int, int]] = []
        pool = ThreadPool(self.builders)
        submit = pool.submit

        def recorded(item: Any, slices: int = 1) -> int:
            self.submitted.append((item.start, item.stop))
            return submit(item, slices)

        pool.submit = recorded  # type: ignore[method-assign]
        return pool


def test_no_pool_is_asked_for_an_item_without_rows(specs: list[StreamSpec]) -> None:
    """So that a pool, of processes or of Ray actors, needs no rule for it."""
    with PoolAsRay(specs[1:], 0, 2, 0) as loader:
        ((batch,),) = [step["text"] for step in loader.steps(0, 1)]
        assert (batch.start, batch.stop, batch.weights.tolist()) == (0, 0, [0.0])
        assert loader.submitted == []


def open_stream(root: Path, **options: Any) -> Stream:
    return Stream(
        str(root / "first"),
        image=ImageSpec(SIZE),
        text=TextSpec(str(root / "tokenizer"), LENGTH),
        seed=3,
        **options,
    )


@pytest.mark.parametrize("dummies", [False, True])
def test_a_stream_serves_a_rank_its_rows(specs: list[StreamSpec], dummies: bool) -> None:
    """By default only these, for some ranks none; also after a resume into changed data."""
    root = Path(specs[0].sources["first"].path).parent
    with open_stream(root, batch={0: 5, 2: 3}) as stream:
        wholes = [next(stream) for _ in range(STEPS)]
    for world_size in (2, 4):
        parts: list[list[Batch]] = []
        for rank in range(world_size):
            options: dict[str, Any] = {"rank": rank, "world_size": world_size, "dummy_rows": dummies}
            with open_stream(root, batch={0: 5, 2: 3}, **options) as stream:
                parts.append([next(stream)])
                state = stream.state()
            with open_stream(root, batch={0: 5, 2: 3}, **options) as stream:
                stream.resume(state)
                parts[-1] += [next(stream) for _ in range(STEPS - 1)]
        for step, whole in enumerate(wholes):
            check_whole([of_rank[step] for of_rank in parts], whole)
            rows = whole.stop - whole.start
            for rank, of_rank in enumerate(parts):
                own = (rank + 1) * rows // world_size - rank * rows // world_size
                assert len(of_rank[step].weights) == (-(-rows // world_size) if dummies else own)


def test_a_stream_keeps_its_dummy_rows_when_its_data_has_changed(specs: list[StreamSpec]) -> None:
    root = Path(specs[0].sources["first"].path).parent
    with open_stream(root, batch=3, lanes=1) as stream:
        next(stream)
        state = stream.state()
    with open_stream(root, batch=1, lanes=1, rank=0, world_size=2, dummy_rows=True) as stream:
        assert stream.resume(state, accept_change=True)
        assert next(stream).weights.tolist() == [0.0]


def test_an_evaluation_has_dummy_rows_behind_its_rows(specs: list[StreamSpec]) -> None:
    """11 rows of 14 samples, on ranks of an even size; the padding of the last batch is of the same rows."""
    spec = dataclasses.replace(specs[0], sources={"first": specs[0].sources["first"]}, batch=11, lanes=None)
    evaluation = EvaluationPass(spec)
    whole = evaluation.make(1, 0, 11)
    assert whole.weights.tolist() == [1.0] * 3 + [0.0] * 8
    rows = evaluation.make(1, 1, 3, dummies=2)
    assert (rows.start, rows.stop, rows.samples, len(rows.meta or [])) == (1, 3, {"first": 2}, 4)
    for field in (*ROW_FIELDS, "pixels"):
        np.testing.assert_array_equal(getattr(rows, field), getattr(whole, field)[1:5])
    nothing = evaluation.make(0, 4, 4, dummies=1)
    assert (nothing.weights.tolist(), nothing.samples, nothing.bad) == ([0.0], {"first": 0}, [])
