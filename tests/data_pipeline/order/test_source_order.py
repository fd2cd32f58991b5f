"""One source: lengths of runs, borders between its layouts, its samples in blocks of rows, and replacements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from data_pipeline.order.source_order import LaneLayout, SourceOrder, run_length
from data_pipeline.order.stream_order import SourceCounts, StreamOrder


def test_lengths_of_runs_keep_16384_runs_where_they_can() -> None:
    by_samples = {
        1: 1, 16_383: 1, 16_384: 1, 32_767: 1, 32_768: 2, 49_151: 2, 49_152: 3, 16_384 * 64 - 1: 63,
        16_384 * 64: 64, 16_384 * 65: 64, 10**12: 64,
    }  # fmt: skip
    assert {samples: run_length(samples) for samples in by_samples} == by_samples


@pytest.mark.parametrize(
    ("lanes", "fits", "run"), [(1, 16, 1), (3, 48, 1), (1024, 16_384, 1), (2048, 16 * 2048 * 64, 64)]
)
def test_a_source_is_divided_from_one_window_a_lane_on(lanes: int, fits: int, run: int) -> None:
    """A window is 16 runs; below that number of samples a lane, all lanes share one piece of runs of one sample."""
    layout = LaneLayout(fits, lanes)
    assert (layout.interleaved, layout.run, layout.pieces) == (False, run, lanes)
    layout = LaneLayout(fits - 1, lanes)
    assert (layout.interleaved, layout.run, layout.pieces) == (True, 1, 1)


@pytest.mark.parametrize("lanes", [257, 512])
def test_a_piece_of_four_windows_is_divided_into_them(lanes: int) -> None:
    four = 4 * 16 * 64 * lanes
    assert SourceOrder("a", np.array([four]), lanes, 0).windows
    assert not SourceOrder("a", np.array([four - 1]), lanes, 0).windows


@pytest.mark.parametrize(
    "counts", [np.array([3, -1]), np.array([1.5]), np.array([[3, 4]]), np.array(3), np.array([True, False])]
)
def test_counts_are_whole_numbers_by_shard(counts: np.ndarray) -> None:
    with pytest.raises(UserError, match="source 'a': samples by shard must be whole numbers of at least 0"):
        SourceOrder("a", counts, 1, 0)


def test_a_source_without_samples_is_refused() -> None:
    with pytest.raises(UserError, match="source 'a': its 3 shards contain no samples; check its path"):
        SourceOrder("a", np.array([0, 0, 0]), 1, 0)


def test_one_zero_sample_shard_more_is_another_source() -> None:
    hashes = [
        SourceOrder("a", np.array(counts), 2, 0).counts_hash
        for counts in ([5, 6], [6, 5], [5, 6, 0], [0, 5, 6], [11])
    ]
    assert len(set(hashes)) == 5


@pytest.mark.parametrize("sizes", [(90_001,), (90_001, 500), (700, 90_001, 40_000)])
def test_many_rows_at_once_are_what_each_part_of_them_is(sizes: tuple[int, ...]) -> None:
    """Rows are located in blocks of 16,384; the parts here end elsewhere."""
    order = StreamOrder(
        [SourceCounts(f"s{k}", np.array([n // 2, n - n // 2])) for k, n in enumerate(sizes)], 40_000, 8, 3
    )
    for step in (0, 5):
        whole = order.refs(step)
        parts = [order.refs(step, start, min(start + 9_999, 40_000)) for start in range(0, 40_000, 9_999)]
        for field in ("row", "source", "epoch", "shard", "index"):
            assert np.array_equal(getattr(whole, field), np.concatenate([getattr(p, field) for p in parts]))


@st.composite
def manifests(draw: Any) -> np.ndarray:
    """Samples by shard, at least one in total; some shards are empty or have one sample."""
    counts = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 7, 20, 60]), min_size=1, max_size=6))
    counts[draw(st.integers(0, len(counts) - 1))] += 1
    return np.array(counts)


@settings(max_examples=60, deadline=None)
@given(manifests(), st.integers(0, 3), st.integers(0, 2**64 - 1), st.data())
def test_replacements_are_others_of_the_shard_then_of_the_source(
    counts: np.ndarray, epoch: int, seed: int, data: st.DataObject
) -> None:
    order = StreamOrder([SourceCounts("a", counts)], 4, 2, seed)
    shard = data.draw(st.sampled_from(np.flatnonzero(counts).tolist()))
    index = data.draw(st.integers(0, int(counts[shard]) - 1))
    if counts.sum() == 1:
        with pytest.raises(UserError, match="only sample"):
            order.replacement(0, shard, index, epoch, 1)
        return
    tries = [order.replacement(0, shard, index, epoch, attempt) for attempt in range(1, 30)]
    assert (shard, index) not in tries
    assert all(0 <= i < counts[s] for s, i in tries)
    near = min(8, int(counts[shard]) - 1)
    assert all(s == shard for s, _ in tries[:near])
    assert len(set(tries[:near])) == near
    assert set(tries[near : near + counts.sum() - 1]) == set(
        tries[near:]
    )  # the whole source before any comes twice
    assert len(set(tries[near:])) == min(len(tries) - near, counts.sum() - 1)


def test_attempts_count_from_1() -> None:
    with pytest.raises(ValueError, match="attempt 0: attempts count from 1"):
        SourceOrder("a", np.array([5]), 1, 0).replacement(0, 2, 0, 0)


def test_a_bad_sample_s_replacements_are_its_own() -> None:
    """Other samples, epochs, seeds and names have other replacements; each neighbour comes first in some epoch."""
    counts, tries = np.array([0, 40, 2000]), range(1, 40)

    def replacements(shard: int, index: int, epoch: int, seed: int, name: str) -> list[Any]:
        source = SourceOrder(name, counts, 1, seed)
        return [source.replacement(shard, index, epoch, attempt) for attempt in tries]

    lists = [
        replacements(*of)
        for of in (
            (1, 7, 0, 0, "a"),
            (1, 8, 0, 0, "a"),
            (1, 7, 1, 0, "a"),
            (1, 7, 0, 1, "a"),
            (1, 7, 0, 0, "b"),
        )
    ]
    for at, one in enumerate(lists):
        for other in lists[:at]:
            assert sum(x == y for x, y in zip(one, other, strict=True)) < 6  # 8 / 39 + 31 / 2039 expected
    source = SourceOrder("a", counts, 1, 0)
    first = {source.replacement(1, 7, epoch, 1) for epoch in range(400)}
    assert first == {(1, index) for index in range(40) if index != 7}
