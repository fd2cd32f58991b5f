"""The cycle of a mixture: its closed form against counting, and sources that end."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from data_pipeline.order.mixture import Cycle, count_earlier_equal, floor_sums
from data_pipeline.order.mixture_weights import MAX_CYCLE_SLOTS
from data_pipeline.order.stream_order import SourceCounts, StreamOrder


def source(name: str, samples: int, **keys: Any) -> SourceCounts:
    return SourceCounts(name, np.array([samples]), **keys)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_floor_sums_equal_the_sums(data: st.DataObject) -> None:
    m = data.draw(st.integers(1, 80))
    a, n = data.draw(st.integers(0, m - 1)), data.draw(st.integers(0, m))
    b = data.draw(st.lists(st.integers(0, 2 * m), min_size=1, max_size=5))
    assert floor_sums(n, m, a, np.array(b)).tolist() == [sum((a * t + c) // m for t in range(n)) for c in b]


def test_floor_sums_do_not_overflow_at_the_limit() -> None:
    m, a, n, b = MAX_CYCLE_SLOTS, MAX_CYCLE_SLOTS - 1, MAX_CYCLE_SLOTS, 2 * MAX_CYCLE_SLOTS
    # (a t + b) // m = t + 2 - (t > 0) for t < m = n = b / 2, since a t + b = m t + b - t
    assert floor_sums(n, m, a, np.array([b])).tolist() == [n * (n - 1) // 2 + 2 * n - (n - 1)]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), st.integers(1, 9), st.integers(0, 150)
)
def test_consumed_equals_counting(weights: list[int], lanes: int, slots: int) -> None:
    cycle, lane = Cycle(weights, lanes), np.arange(lanes)
    dealt = cycle.sources(lane[:, None], np.arange(slots))
    want = [[int((dealt[i] == k).sum()) for i in range(lanes)] for k in range(len(weights))]
    assert cycle.consumed(lane, slots).tolist() == want


@pytest.mark.parametrize("groups", [1, 3, 200, 40_000])
def test_earlier_equals_are_counted(groups: int) -> None:
    values = np.random.RandomState(groups).randint(0, groups, (5, 300)) + 40_000 * (groups == 200)
    values[:, 7:20] = values[:, :1]
    want = [[row[:at].tolist().count(one) for at, one in enumerate(row)] for row in values]
    assert count_earlier_equal(values).tolist() == want
    small = values % 200
    assert count_earlier_equal(small).tolist() == [
        [row[:at].tolist().count(x) for at, x in enumerate(row)] for row in small
    ]


def test_a_huge_cycle_is_counted_where_it_cannot_be_walked() -> None:
    weights = [413_000_123, 3_318_333, 12_000_001, 1_700_000_000]
    cycle, lane, at = Cycle(weights, 64), np.arange(64), 1_234_567_890_123
    step = cycle.consumed(lane, at + 5000) - cycle.consumed(lane, at)
    dealt = cycle.sources(lane[:, None], at + np.arange(5000))
    assert step.tolist() == [(dealt == k).sum(axis=1).tolist() for k in range(4)]
    assert (abs(cycle.consumed(lane, at) - at * (np.array(weights) / sum(weights))[:, None]) < 12).all()
    assert (cycle.consumed(lane, sum(weights)) == np.array(weights)[:, None]).all()


@pytest.mark.parametrize("passes", [1e10, 1e18, 1e300])
def test_an_end_that_no_run_gets_to_is_none(passes: float) -> None:
    order = StreamOrder([source("large", 2_300_000_000, max_epochs=passes)], 65_536, 1024, 3)
    assert (order.ends, order.last_step) == ({}, None)
    assert order.refs(10**9, 0, 4).epoch.tolist() == [10**9 * 65_536 // 2_300_000_000] * 4
    nearer = StreamOrder([source("large", 2_300_000_000, max_epochs=1e6)], 65_536, 1024, 3)
    assert nearer.last_step == pytest.approx(2.3e15 / 65_536, rel=1e-9)


def test_a_source_ends_after_its_max_epochs_and_the_others_go_on() -> None:
    sources = [source("small", 90, weight=1, max_epochs=2.5), source("large", 4000, weight=3)]
    order = StreamOrder(sources, 32, 8, 3)
    (end,) = order.ends.values()
    assert list(order.ends) == ["small"]
    refs = [order.refs(step) for step in range(600)]
    seen = Counter(step for step, r in enumerate(refs) for k in r.source.tolist() if k == 0)
    assert max(seen) == end - 1
    before = sum(n for step, n in seen.items() if step < end - 1)
    assert before < 2.5 * 90 <= sum(seen.values())  # the first step at whose end the passes are complete
    visits = Counter(
        (int(e), int(i)) for r in refs for k, e, i in zip(r.source, r.epoch, r.index, strict=True) if k == 1
    )
    assert set(visits.values()) == {1}  # the change of the cycle costs the other source no sample
    assert {i for e, i in visits if e == 2} == set(range(4000))
    assert order.consumed(600)["large"] == 600 * 32 - sum(seen.values())
    again = StreamOrder(sources, 32, 8, 3)
    for step in (end - 1, end, end + 1):
        assert np.array_equal(again.refs(step, 3, 29).index, refs[step].index[3:29])


@pytest.mark.parametrize("weights", [(2, 5), (1, 6), (3, 10), (1, 12), (5, 3), (7, 16)])
def test_sources_cut_into_lanes_have_all_their_passes_before_they_end(weights: tuple[int, int]) -> None:
    sizes, passes = (701, 903), (2, 1)
    names = ("a", "b")
    sources = [
        source(*s, weight=w, max_epochs=p) for *s, w, p in zip(names, sizes, weights, passes, strict=True)
    ]
    order = StreamOrder(sources, 12, 4, 3)
    assert not any(one.interleaved for one in order.sources)
    assert order.last_step == max(order.ends.values())
    refs = [order.refs(step) for step in range(order.last_step)]
    for k in (0, 1):
        visits = Counter(
            (int(e), int(i))
            for r in refs
            for s, e, i in zip(r.source, r.epoch, r.index, strict=True)
            if s == k
        )
        assert all(visits[e, i] == 1 for e in range(passes[k]) for i in range(sizes[k]))
        assert len(visits) - passes[k] * sizes[k] < 12 + 4 * 4
    with pytest.raises(UserError, match=f"after {order.last_step} steps"):
        order.refs(order.last_step)


def test_a_stream_of_whole_batches_ends_with_its_last_sample() -> None:
    order = StreamOrder([source("a", 64, max_epochs=2)], 32, 8, 0)
    assert (order.ends, order.last_step) == ({"a": 4}, 4)
