"""StreamOrder: exact epochs, exact shares, any slices, how samples spread, and golden values."""

from __future__ import annotations

from collections import Counter
from math import gcd
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.hashing import Purpose, hash64
from data_pipeline.order.stream_order import (
    SampleRefs,
    SourceCounts,
    StreamOrder,
    row_keys,
    sample_ids,
    stream_seed,
)

FIELDS = ("row", "source", "epoch", "shard", "index")
divisors = st.sampled_from(
    [(4, 1), (4, 2), (6, 3), (8, None), (8, 4), (12, 2), (16, 4), (16, 16), (24, 8), (7, None)]
)
seeds = st.one_of(st.integers(0, 5), st.integers(2**63, 2**64 - 1))


@st.composite
def manifests(draw: Any, most: int = 60) -> np.ndarray:
    """Samples by shard, at least one in total; some shards are empty or have one sample."""
    counts = draw(st.lists(st.sampled_from([0, 1, 1, 2, 3, 7, 20, most]), min_size=1, max_size=6))
    counts[draw(st.integers(0, len(counts) - 1))] += 1
    return np.array(counts)


@st.composite
def mixtures(draw: Any) -> list[SourceCounts]:
    number = draw(st.integers(1, 4))
    weighted = draw(st.booleans())
    cut = np.array(
        [0, 201, 1, 200] if draw(st.booleans()) else [], np.int64
    )  # large enough for lanes of its own
    return [
        SourceCounts(
            name=f"s{k}",
            counts=np.concatenate([draw(manifests()), cut]),
            weight=draw(st.sampled_from([0.1, 0.25, 1, 2, 3, 0.3])) if weighted else None,
        )
        for k in range(number)
    ]


def tuples(refs: SampleRefs) -> list[tuple[int, ...]]:
    return list(zip(*(getattr(refs, field).tolist() for field in FIELDS), strict=True))


def sequence(order: StreamOrder, steps: int) -> list[tuple[int, ...]]:
    """(source, epoch, shard, index) of all rows of the first `steps` steps, in order."""
    return [ref[1:] for step in range(steps) for ref in tuples(order.refs(step))]


def check_epochs(taken: list[tuple[int, ...]], source: int, counts: np.ndarray, whole: int) -> None:
    """Check that the first `whole` epochs have every sample once, and that no epoch has a sample twice."""
    every = {(shard, index) for shard, count in enumerate(counts) for index in range(count)}
    seen = Counter(ref[1:] for ref in taken if ref[0] == source)
    assert max(seen.values()) == 1
    for epoch in range(whole):
        assert {ref[1:] for ref in seen if ref[0] == epoch} == every
    assert {ref[1:] for ref in seen} <= every


@settings(max_examples=60, deadline=None)
@given(manifests(most=200), divisors, seeds)
def test_one_source_visits_every_sample_once_an_epoch(counts: np.ndarray, shape: Any, seed: int) -> None:
    batch, lanes = shape
    order = StreamOrder([SourceCounts("a", counts)], batch, lanes, seed)
    epochs = 3
    steps = -(-epochs * int(counts.sum()) // batch)
    check_epochs(sequence(order, steps), 0, counts, epochs)


@settings(max_examples=25, deadline=None)
@given(mixtures(), divisors, seeds)
def test_mixture_has_exact_shares_and_exact_epochs(
    sources: list[SourceCounts], shape: Any, seed: int
) -> None:
    batch, lanes = shape
    order = StreamOrder(sources, batch, lanes, seed)
    per_lane, cycle = batch // order.lanes, sum(order.weights)
    whole_cycles = cycle // gcd(cycle, per_lane)  # steps after which each lane has walked whole cycles
    steps = whole_cycles * max(1, 100 // whole_cycles) if whole_cycles <= 300 else 100
    taken = sequence(order, steps)
    dealt = Counter(ref[0] for ref in taken)
    if whole_cycles <= 300:
        assert [dealt[k] * cycle for k in range(len(sources))] == [
            steps * batch * weight for weight in order.weights
        ]
    for k, source in enumerate(sources):
        # lanes of a source that is cut may be a few draws apart; an epoch is whole once each lane has passed its end
        sure = dealt[k] if order.sources[k].interleaved else max(0, dealt[k] - 4 * order.lanes)
        if dealt[k]:
            check_epochs(taken, k, source.counts, sure // int(source.counts.sum()))


@settings(max_examples=40, deadline=None)
@given(mixtures(), divisors, seeds, st.integers(0, 10**6), st.integers(1, 16))
def test_slices_of_any_world_size_make_the_batch(
    sources: list[SourceCounts], shape: Any, seed: int, step: int, world: int
) -> None:
    batch, lanes = shape
    whole = tuples(StreamOrder(sources, batch, lanes, seed).refs(step))
    assert [ref[0] for ref in whole] == list(range(batch))
    parts = []
    for rank in range(world):  # world sizes that do not divide the batch are only uneven slices here
        order = StreamOrder(sources, batch, lanes, seed)
        parts += tuples(order.refs(step, rank * batch // world, (rank + 1) * batch // world))
    assert parts == whole


@pytest.mark.parametrize(("samples", "lanes"), [(100_003, 64), (1_000_000, 16), (40_000, 256), (300_000, 1)])
def test_long_sources_with_runs_and_windows_have_exact_epochs(samples: int, lanes: int) -> None:
    counts = np.full(97, samples // 97)
    counts[-1] += samples - counts.sum()
    counts = np.insert(counts, [0, 50, 97], [0, 1, 0])
    counts[60] -= 1
    batch = 16_384
    order = StreamOrder([SourceCounts("a", counts)], batch, lanes, 3)
    assert not order.sources[0].interleaved
    refs = [order.refs(step) for step in range(-(-2 * samples // batch))]
    first = np.concatenate([[0], np.cumsum(counts)])
    sample = np.concatenate([first[r.shard] + r.index for r in refs])
    assert all((r.index < counts[r.shard]).all() and (r.index >= 0).all() for r in refs)
    epoch = np.concatenate([r.epoch for r in refs])
    for e in (0, 1):
        assert np.array_equal(np.sort(sample[epoch == e]), np.arange(samples))


def test_small_source_is_consumed_in_order_of_its_epochs_over_all_lanes() -> None:
    sources = [
        SourceCounts("tiny", np.array([3, 0, 4]), weight=0.1),
        SourceCounts("large", np.full(10, 9_000), weight=0.9),
    ]
    order = StreamOrder(sources, 256, 256, 1)
    assert [source.interleaved for source in order.sources] == [True, False]
    taken = [ref[2:] for step in range(30) for ref in tuples(order.refs(step)) if ref[1] == 0]
    epochs = [epoch for epoch, _, _ in taken]
    assert epochs == sorted(epochs)  # with one slot a lane and step, row order is the order of consumption
    assert all(len(set(taken[i : i + 7])) == 7 for i in range(0, len(taken) - 7, 7))


def test_lane_reads_runs_of_its_own_share_only() -> None:
    samples, lanes, batch = 2_000_000, 16, 4096
    order = StreamOrder([SourceCounts("a", np.full(200, 10_000))], batch, lanes, 5)
    steps = samples // batch
    refs = [order.refs(step) for step in range(steps)]
    run = np.stack([(r.shard * 10_000 + r.index) // 64 for r in refs]).reshape(steps, lanes, -1)
    owners = [np.unique(run[:, lane]) for lane in range(lanes)]
    assert sum(map(len, owners)) <= samples // 64 + 2 * lanes  # a run at a piece's edge has two owners
    window = run[: 1024 * 3 // (batch // lanes), 0].ravel()  # three windows' worth of samples of one lane
    assert len(np.unique(window)) <= 3 * 16 + 2 * 16
    starts = [int(np.flatnonzero(~np.isin(run[:, lane].ravel(), run[0, lane]))[0]) for lane in range(lanes)]
    assert len(set(starts)) > lanes // 2  # the windows' grid starts elsewhere in each lane


@pytest.mark.parametrize(
    ("shards", "steps", "most"),
    [(232_000, [0, 7_000, 30_000], 6.0), (400, [0, 20, 60], 2.0), (150, [0, 9, 20], 2.0)],
)
def test_topics_of_a_batch_are_spread_as_the_design_asks(shards: int, steps: list[int], most: float) -> None:
    """With one topic per shard: the variance of a topic's rows in a batch, relative to independent draws."""
    batch = 65_536
    order = StreamOrder([SourceCounts("a", np.full(shards, 10_000))], batch, None, 1)
    rows = np.stack([np.bincount(order.refs(step).shard, minlength=shards) for step in steps])
    mean = batch / shards
    assert ((rows - mean) ** 2).mean() / (mean * (1 - 1 / shards)) <= most


def test_a_source_smaller_than_its_lanes_windows_is_not_read_run_after_run() -> None:
    order = StreamOrder([SourceCounts("a", np.full(200, 1000))], 4096, 2048, 1)
    assert order.sources[0].interleaved
    rows = np.stack([np.bincount(order.refs(step).shard, minlength=200) for step in (0, 20, 40)])
    assert ((rows - 4096 / 200) ** 2).mean() / (4096 / 200) <= 1.5


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=2, max_size=5), st.integers(0, 10**7), seeds)
def test_every_batch_holds_the_shares_closely(weights: list[int], step: int, seed: int) -> None:
    sources = [SourceCounts(f"s{k}", np.array([50]), weight=weight) for k, weight in enumerate(weights)]
    order = StreamOrder(sources, 512, 64, seed)
    rows = np.bincount(order.refs(step).source, minlength=len(weights))
    assert (
        abs(rows - 512 * np.array(weights) / sum(weights)).max() <= 16
    )  # two rows for each of a lane's 8 slots


def test_seeds_epochs_and_names_give_other_orders() -> None:
    def first_epochs(name: str, seed: int) -> list[list[int]]:
        taken = sequence(StreamOrder([SourceCounts(name, np.array([500]))], 50, None, seed), 20)
        return [[ref[3] for ref in taken if ref[1] == epoch] for epoch in (0, 1)]

    orders = [
        *first_epochs("a", 1),
        *first_epochs("a", 2),
        *first_epochs("b", 1),
        first_epochs("a", 2**64 - 1)[0],
    ]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert sum(x == y for x, y in zip(one, other, strict=True)) < 15  # 1 expected by chance
    assert stream_seed(0, "masked", "pairs") not in {
        stream_seed(0, "tuned", "pairs"),
        stream_seed(1, "masked", "pairs"),
    }


def test_each_sample_comes_first_equally_often() -> None:
    firsts = [
        int(StreamOrder([SourceCounts("a", np.array([12]))], 4, 2, seed).refs(0, 0, 1).index[0])
        for seed in range(600)
    ]
    chi2 = sum((n - 50) ** 2 / 50 for n in np.bincount(firsts, minlength=12))
    assert chi2 < 11 + 5 * 22**0.5


def test_golden_order_and_keys() -> None:
    large, small = np.array([30_000, 0, 25_000, 1]), np.array([2, 0, 5])
    sources = [SourceCounts("large", large, weight=0.7), SourceCounts("small", small, weight=0.3)]
    order = StreamOrder(sources, 16, 8, stream_seed(0, "main", "pairs"))
    assert stream_seed(0, "main", "pairs") == 6478355704434186628
    assert [ref[1:] for ref in tuples(order.refs(5000, 2, 10))] == [
        (0, 1, 0, 22532),
        (1, 3429, 2, 0),
        (0, 1, 0, 12815),
        (1, 3429, 2, 4),
        (0, 1, 0, 6778),
        (0, 1, 0, 10928),
        (0, 1, 0, 26529),
        (0, 1, 0, 12175),
    ]
    assert order.mixture_hash == "af39e3379684588e"
    assert [order.replacement(0, 2, 77, 1, attempt) for attempt in (1, 2, 8, 9)] == [
        (2, 5803),
        (2, 9306),
        (2, 14781),
        (2, 14079),
    ]
    assert sample_ids("digits", np.array([0, 3]), np.array([5, 9])).tolist() == [
        4616852041586542739,
        9452643211967024802,
    ]
    keys = row_keys(7, "digits", np.array([0, 3]), np.array([5, 9]), np.array([0, 1]), 0)
    assert keys.tolist() == [4761768014145018714, 3382183068227524247]
    assert hash64(keys, Purpose.IMAGE_MASK).tolist() == [16084943130575020025, 10740604152104384542]
