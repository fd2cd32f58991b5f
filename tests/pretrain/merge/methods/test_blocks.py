"""Blocks and threads: each tensor is read once for all plans, results come in order, and plans share caches safely."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest

from pretrain.merge.merge_plan import TensorJob, Term
from pretrain.merge.methods import blocks, native
from pretrain.merge.methods.blocks import Block, Workers
from pretrain.merge.methods.compute import prepare
from pretrain.merge.output.writer import rounded
from pretrain.weights import dtypes
from pretrain.weights.dtypes import DTYPES
from pretrain.weights.source import WeightSource
from tests.support.merge_inputs import floats
from tests.support.merge_jobs import Held

COUNT = 700


class Counted(Held):
    """Counts how often each range is read."""

    def __init__(self, array: np.ndarray, dtype: str) -> None:
        super().__init__(array, dtype)
        self.reads: Counter[tuple[int, int]] = Counter()

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        self.reads[start, stop] += 1
        return super().read(name, start, stop)


def sources(*stored: str) -> list[Counted]:
    """Four tensors near each other; the last one serves as a base."""
    base = floats(9, COUNT)
    arrays = [base + floats(number, COUNT, scale=0.1) for number in range(3)] + [base]
    return [
        Counted(dtypes.narrow(array.astype(np.float64), kind), kind)
        for array, kind in zip(arrays, stored, strict=True)
    ]


def jobs_of(method: str, weights: list[tuple[float, float, float]], **options: Any) -> list[TensorJob]:
    """The jobs of a sweep: they differ in their weights, and terms of weight 0 are left out."""
    based = method not in ("linear", "slerp", "karcher", "multislerp")
    return [
        TensorJob(
            "w", "F32", (COUNT,), cast(Any, method),
            tuple(Term(k, "w", w, 0.3 + 0.2 * k) for k, w in enumerate(row) if w),
            Term(3, "w") if based else None, tuple(sorted({**options, "t": row[1]}.items())), "mixed", 0, 0,
        )
        for row in weights
    ]  # fmt: skip


def results(jobs: list[TensorJob], held: list[Counted], block: int) -> list[bytes]:
    found = [np.empty(COUNT, DTYPES[job.dtype]) for job in jobs]
    with Workers(cast("list[WeightSource]", held), len(jobs), 2, block) as workers:
        computes = [prepare(job, workers) for job in jobs]
        for source in held:
            source.reads.clear()
        with np.errstate(all="ignore"):
            for at in workers.blocks(0, COUNT):
                for number, (job, compute) in enumerate(zip(jobs, computes, strict=True)):
                    found[number][at.start : at.stop] = rounded(at, job, compute)
    return [one.tobytes() for one in found]


METHODS: dict[str, dict[str, Any]] = {
    "linear": {}, "slerp": {}, "nuslerp": {}, "multislerp": {}, "karcher": {}, "model_stock": {},
    "sce": {"select_topk": 0.5},
    "task_arithmetic": {}, "ties": {}, "dare_linear": {"seed": 1}, "dare_ties": {"rescale": "l1"},
    "breadcrumbs": {"gamma": 0.1, "rescale": "l1"}, "breadcrumbs_ties": {"gamma": 0.05},
}  # fmt: skip
PAIRS = [(0.25, 0.75, 0.0), (1.5, -0.5, 0.0), (0.0, 0.5, 0.5)]
TRIPLES = [(0.25, 0.5, 0.25), (0.25, 0.75, 0.0), (0.0, 0.5, 0.5), (-1.0, 0.5, 2.0), (0.5, 0.0, 1.0)]


@pytest.mark.parametrize("passes", ["compiled", "numpy"])
@pytest.mark.parametrize("method", METHODS)
def test_plans_together_have_the_bits_of_each_alone_and_read_once(
    method: str, passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of several dtypes, so that terms that are left out change the accumulation type."""
    if passes == "numpy":
        monkeypatch.setattr(native, "compiled_function", lambda *_: None)
    held = sources("BF16", "F16", "F32", "BF16")
    sweep = jobs_of(
        method, PAIRS if "slerp" in method and method != "multislerp" else TRIPLES, **METHODS[method]
    )
    together = results([*sweep, *sweep[:2]], held, 333)
    assert all(set(source.reads.values()) <= {1} for source in held)
    assert all(len(source.reads) in (0, 3) for source in held)  # blocks of 333; linear sums have no base
    assert together[len(sweep) :] == together[:2]
    alone = [results([job], held, 1 << 16)[0] for job in sweep]
    assert together[: len(sweep)] == alone
    assert len(set(alone)) == len(sweep) or method in ("karcher", "model_stock", "sce")


def test_a_block_moves_and_forgets() -> None:
    held = sources("BF16", "F16", "F32", "F64")
    block, term = Block(cast("list[WeightSource]", held), 2), Term(0, "w")
    assert len(block) == 0
    for start, stop in ((0, 300), (300, 500), (500, 700), (0, 300)):
        assert block.move(start, stop) is block
        assert (block.start, block.stop, len(block)) == (start, stop, stop - start)
        bits = held[0].array[start:stop].astype(np.uint32) << 16
        exact = bits.view(np.float32).astype(np.float64)
        for kind in (np.float32, np.float64):
            for _ in range(2):
                np.testing.assert_array_equal(block.wide(term, kind), exact)
                assert block.wide(term, kind).dtype == kind
        other = held[3].array[start:stop]
        np.testing.assert_array_equal(block.wide(Term(3, "w"), np.float64), other)
        np.testing.assert_array_equal(block.wide(term, np.float64), exact)
        out = block.array("difference", np.float64)
        assert block.difference(term, Term(3, "w"), out) is out
        np.testing.assert_array_equal(out, exact - other)
        np.testing.assert_array_equal(block.wide(term, np.float64), exact)
        np.testing.assert_array_equal(block.scaled(term, np.float64(0.3), "use"), exact * 0.3)
        np.testing.assert_array_equal(block.wide(term, np.float64), exact)
    assert held[0].reads == {(0, 300): 2, (300, 500): 1, (500, 700): 1}


@pytest.mark.parametrize(("threads", "ahead"), [(1, 0), (1, 2), (2, 1), (3, 2)])
def test_results_come_in_order_and_items_are_taken_when_they_are_needed(threads: int, ahead: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(40):
            taken.append(number)
            yield number

    with Workers([], threads=threads, ahead=ahead) as workers:
        found = workers.map(lambda number: number * number, items())
        for number in range(40):
            assert next(found) == number * number
            assert len(taken) == min(40, number + 1 + threads * ahead)
        assert next(found, None) is None


def test_threads_run_at_the_same_time_and_errors_arrive() -> None:
    barrier = threading.Barrier(3)
    with Workers([], threads=3) as workers:
        assert sorted(workers.map(lambda _: barrier.wait(60), range(6))) == [0, 0, 1, 1, 2, 2]
        with pytest.raises(ZeroDivisionError):
            list(workers.map(lambda number: 1 // number, [1, 0]))
    with pytest.raises(RuntimeError, match="after shutdown"):  # its threads have ended
        list(workers.map(abs, [1]))


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 640])
def test_spans_and_blocks_cover_each_element_once(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "ELEMENTS_PER_SPAN", 64)
    covered = list(blocks.spans(count))
    assert [n for start, stop in covered for n in range(start, stop)] == list(range(count))
    assert all(0 < stop - start <= 64 for start, stop in covered)
    assert len(covered) == -(-count // 64)
    with Workers([], threads=2, block=10) as workers:
        assert list(workers.map_spans(lambda start, stop: (start, stop), count)) == covered
        for length, size in ((None, 10), (7, 7)):
            moved = [(b.start, b.stop) for b in workers.blocks(3, 3 + count, length)]
            assert [n for start, stop in moved for n in range(start, stop)] == list(range(3, 3 + count))
            assert len(moved) == -(-count // size)
        own = [*workers.blocks(0, 100), *workers.blocks(0, 100)]
        assert all(block is own[0] for block in own)  # a thread moves its one block


def test_what_is_cached_is_computed_once_until_it_is_dropped() -> None:
    calls: list[str] = []

    def compute(key: str) -> str:
        calls.append(key)
        return key.upper()

    with Workers([], threads=1) as workers:
        for _ in range(2):
            assert [workers.cached(key, lambda k=key: compute(k)) for key in "aba"] == ["A", "B", "A"]  # type: ignore[misc]
        workers.clear_cache()
        assert workers.cached("a", lambda: compute("a")) == "A"
    assert calls == ["a", "b", "a"]


def test_infinities_warn_nobody() -> None:
    with Workers([], threads=1) as workers, np.errstate(all="raise"):
        zero = np.zeros(2)
        assert np.isnan(next(workers.map(lambda x: x / x, [zero]))).all()
        assert np.isnan(workers.cached("key", lambda: zero / zero)).all()
