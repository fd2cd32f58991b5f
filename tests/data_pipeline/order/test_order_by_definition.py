"""StreamOrder against the naive order: mixtures, schedules, lanes, slices, resumes and accepted changes."""

from __future__ import annotations

import itertools
import json
import pickle
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from data_pipeline.order import source_order
from data_pipeline.order.source_order import SampleLocator, SourceOrder
from data_pipeline.order.stream_order import SourceCounts, StreamOrder
from tests.support.naive_order import Change, Mixture, Source, epoch_pieces, simulate_order, weights_of

STEPS = 24


def short_runs(samples: int) -> int:
    """Run lengths that give small sources several windows: 2 samples per run from 60 samples on, 3 from 150 on."""
    return min(3, max(1, samples // 50 + (samples >= 60)))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_order, "run_length", short_runs)


COUNTS = st.one_of(
    st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 9]), min_size=1, max_size=5),
    st.sampled_from([[40, 0, 1, 30], [1] * 35, [0, 64, 64, 0], [130, 1, 0, 169], [400, 3]]),
    # one window or four windows a lane, and one sample less
    st.sampled_from([[15], [16], [31], [32], [47], [48], [100, 91], [100, 92], [200, 183], [200, 184]]),
).map(lambda counts: tuple(counts) if any(counts) else (*counts, 1))
LANES = st.sampled_from([1, 2, 3, 4])
# The costly checks of a step: slices of many ranks, and an order that is built again.
ONE_IN_FOUR = st.integers(0, 3).map(lambda drawn: drawn == 0)


@st.composite
def mixtures(draw: Any, lanes: int, first_step: int = 0, of: tuple[Source, ...] = ()) -> Mixture:
    """A random mixture. With `of`, it keeps some of these sources, changes others, and adds or drops some."""
    weighted = draw(st.sampled_from(["all", "none", "some"]))
    names = draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4, unique=True))
    sources = []
    for number, name in enumerate(names):
        old = next((source for source in of if source.name == name), None)
        kept = old is not None and draw(st.booleans())
        counts, fingerprint = (old.counts, old.fingerprint) if kept and old else (draw(COUNTS), "new")
        if not kept and draw(st.booleans()):
            fingerprint = f"at {first_step}"
        share: dict[str, Any] = {"max_epochs": draw(st.sampled_from([None, None, None, 0.5, 1, 2, 2.75]))}
        if weighted == "all" or (weighted == "some" and number == 0 and len(names) > 1):
            share["weight"] = draw(st.sampled_from([0.1, 0.25, 0.5, 0.3] + [2, 3] * (weighted == "all")))
        else:
            share["repeat"] = draw(st.sampled_from([None, None, 2, 0.5]))
            share["cap"] = draw(st.sampled_from([None, None, 5, 40]))
        sources.append(Source(name, counts, fingerprint=fingerprint, **share))
    batch = {0: lanes * draw(st.integers(1, 4))}
    for step in draw(st.lists(st.integers(1, STEPS), max_size=2)):
        batch[step] = lanes * draw(st.integers(1, 5))
    return Mixture(first_step, tuple(sources), dict(sorted(batch.items())))


def order(mixture: Mixture, lanes: int, seed: int, segments: Any = ()) -> StreamOrder:
    sources = [
        SourceCounts(s.name, np.array(s.counts), s.weight, s.repeat, s.cap, s.max_epochs)
        for s in mixture.sources
    ]
    by = "sqrt" if mixture.by_sqrt else "size"
    return StreamOrder(sources, mixture.batch, lanes, seed, by, segments)  # type: ignore[arg-type]


def prints(mixture: Mixture) -> dict[str, str]:
    return {source.name: source.fingerprint for source in mixture.sources}


def is_same(one: Mixture, other: Mixture) -> bool:
    """True if two mixtures are equal in sources, their order, samples, integer weights, limits and batches."""
    of = [
        (
            [(s.name, s.counts, s.fingerprint, s.max_epochs) for s in mixture.sources],
            weights_of(mixture),
            mixture.batch,
        )
        for mixture in (one, other)
    ]
    return of[0] == of[1]


def rows(found: StreamOrder, step: int, start: int = 0, stop: int | None = None) -> list[tuple[Any, ...]]:
    refs = found.refs(step, start, stop)
    names = [found.sources[k].name for k in refs.source]
    return list(zip(names, refs.epoch.tolist(), refs.shard.tolist(), refs.index.tolist(), strict=True))


def resumed(mixture: Mixture, lanes: int, seed: int, state: dict[str, Any], accept: bool) -> StreamOrder:
    """The order that another process resumes from the state of a checkpoint."""
    plain = json.loads(json.dumps(state, sort_keys=True))  # as a checkpoint does
    found = order(mixture, lanes, seed).resume(plain, prints(mixture), accept_change=accept)
    return order(mixture, lanes, seed, pickle.loads(pickle.dumps(found.segments)))


@pytest.mark.usefixtures("short")
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_row_is_that_of_the_sequential_walk(data: st.DataObject) -> None:
    lanes, seed = data.draw(LANES), data.draw(st.sampled_from([0, 3, 2**64 - 1]))
    mixture = data.draw(mixtures(lanes))
    ours = order(mixture, lanes, seed)
    served = 0
    taken: Counter[str] = Counter()
    for step, want in enumerate(simulate_order([mixture], STEPS, lanes, seed, short_runs)):
        assert isinstance(want, list)
        assert rows(ours, step) == want
        if data.draw(ONE_IN_FOUR):
            world = data.draw(st.integers(1, 16))
            batch = len(want)
            assert [
                row
                for rank in range(world)
                for row in rows(ours, step, rank * batch // world, (rank + 1) * batch // world)
            ] == want
        assert {name: n for name, n in ours.consumed(step).items() if n} == taken
        if data.draw(ONE_IN_FOUR):
            again = resumed(mixture, lanes, seed, ours.state(step, prints(mixture)), accept=step % 2 == 0)
            assert again.segment.first_step == 0  # nothing changed, so nothing was opened
            assert rows(again, step) == want
        taken.update(name for name, *_ in want)
        served = step + 1
    assert ours.last_step == (served if served < STEPS else ours.last_step)
    if served < STEPS:
        with pytest.raises(UserError, match="stream has ended"):
            ours.refs(served)


@pytest.mark.usefixtures("short")
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_accepted_changes_go_on_as_the_walk_does(data: st.DataObject) -> None:
    """Shards, weights, sources, limits and batches change up to three times, with resumes in between."""
    lanes, seed = data.draw(LANES), data.draw(st.sampled_from([0, 7]))
    plan = [data.draw(mixtures(lanes))]
    for first in sorted(data.draw(st.lists(st.integers(0, STEPS - 1), min_size=1, max_size=3))):
        new = data.draw(mixtures(lanes, first, plan[-1].sources))
        if not is_same(new, plan[-1]):  # that opens nothing, as the test above holds
            plan.append(new)
    mixtures_left = iter(plan)
    mixture = next(mixtures_left)
    ours, step = order(mixture, lanes, seed), 0
    taken: Counter[str] = Counter()
    for want in simulate_order(plan, STEPS, lanes, seed, short_runs):
        state = ours.state(step, prints(mixture))
        assert state["consumed_per_lane"] * lanes == taken.total()
        assert {name: n for name, n in state["consumed"].items() if n} == taken
        if isinstance(want, Change):
            assert want.step == step
            mixture = next(mixtures_left)
            known = len(state["segments"])
            if order(mixture, lanes, seed).mixture_hash != ours.mixture_hash:
                with pytest.raises(UserError, match=r"changed from .* to"):
                    resumed(mixture, lanes, seed, state, accept=False)
            ours = resumed(mixture, lanes, seed, state, accept=True)
            changed = ours.state(step, prints(mixture))["segments"]
            assert len(changed) == known + 1
            assert changed[-1]["unvisited"] == want.unvisited
            assert changed[-1]["first_step"] == step
            continue
        if data.draw(ONE_IN_FOUR):  # once it is opened, a change needs no leave
            ours = resumed(mixture, lanes, seed, state, accept=False)
        assert rows(ours, step) == want
        taken.update(name for name, *_ in want)
        step += 1
    if step < STEPS and mixture is plan[-1]:
        assert ours.last_step == step


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("lanes", [1, 2, 3, 5])
def test_each_epoch_visits_each_sample_once_over_a_change_of_weights_and_of_another_source(
    lanes: int,
) -> None:
    kept, other = (130, 1, 0, 169), (40, 31)
    plan = [
        Mixture(0, (Source("kept", kept, 0.3), Source("other", other, 0.7)), {0: 6 * lanes}),
        Mixture(7, (Source("kept", kept, 0.9), Source("other", (*other, 5), 0.1)), {0: 6 * lanes}),
        Mixture(31, (Source("kept", kept, 0.5), Source("more", (11,), 0.5)), {0: 6 * lanes, 31: 15 * lanes}),
    ]
    ours, taken, mixture = order(plan[0], lanes, 5), [], plan[0]
    for step in range(170):
        for new in plan[1:]:
            if new.first_step == step:
                state, mixture = ours.state(step, prints(mixture)), new
                ours = resumed(mixture, lanes, 5, state, accept=True)
        taken += rows(ours, step)
    visits = Counter(row for row in taken if row[0] == "kept")
    assert set(visits.values()) == {1}
    every = {(shard, index) for shard, number in enumerate(kept) for index in range(number)}
    epochs = sorted({epoch for _, epoch, _, _ in visits})
    whole = [epoch for epoch in epochs if {v[2:] for v in visits if v[1] == epoch} == every]
    assert whole[:3] == [0, 1, 2]
    old, new = (
        {row[1] for row in taken[a:b] if row[0] == "other"} for a, b in ((0, 42 * lanes), (42 * lanes, None))
    )
    assert max(old) < min(new)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("counts", [[(64, 64), (64, 64, 9), (64, 61, 9)], [(9,), (9, 2), (8, 2)]])
def test_max_epochs_counts_the_passes_over_samples_that_a_source_had_before(counts: list[Any]) -> None:
    """The samples change twice; the source ends when the passes over all three sets add up to 2.5."""
    lanes, seed, rest = 2, 1, Source("rest", (5000,), 0.75)
    ends = []
    for passes in (2.5, None):
        plan = [
            Mixture(at, (Source("few", c, 0.25, max_epochs=passes), rest), {0: 16})
            for at, c in zip(
                (0, 11 if len(counts[0]) > 1 else 2, 31 if len(counts[0]) > 1 else 4), counts, strict=True
            )
        ]
        ours = order(plan[0], lanes, seed)
        for before, after in itertools.pairwise(plan):
            ours = resumed(after, lanes, seed, ours.state(after.first_step, prints(before)), accept=True)
        ends.append(ours.ends)
    assert ends[1] == {}
    drawn = [4 * (b.first_step - a.first_step) for a, b in itertools.pairwise(plan)]  # 4 of 16 rows a step
    passes = [Fraction(n, sum(c)) for n, c in zip(drawn, counts, strict=False)]
    left = (Fraction(5, 2) - sum(passes)) * sum(counts[-1])
    want = plan[-1].first_step + left / 4
    assert want <= ends[0]["few"] <= want + 2


def test_a_source_of_runs_and_windows_at_its_true_size() -> None:
    """With the real run length: 2 samples per run, a short run, and windows of 16 runs in 3 lanes."""
    counts = (16_400, 0, 1, 16_368, 2)
    lanes, seed = 3, 11
    ours = order(Mixture(0, (Source("a", counts),), {0: 3 * 1000}), lanes, seed)
    assert (ours.sources[0].run, ours.sources[0].windows) == (2, True)
    for epoch in (0, 1):
        want = epoch_pieces(Source("a", counts), lanes, seed, epoch, source_order.run_length)
        edges = [number * 32_771 // lanes for number in range(lanes + 1)]
        for lane in range(lanes):
            # the draws of the lane's piece in that epoch: those before it are its pieces of earlier epochs
            first = sum(edges[(lane + e) % lanes + 1] - edges[(lane + e) % lanes] for e in range(epoch))
            piece = want[(lane + epoch) % lanes]
            draw = np.arange(first, first + len(piece))
            at = ours._locator.refs(np.zeros_like(draw), np.full_like(draw, lane), draw)
            assert set(at[0].tolist()) == {epoch}
            assert list(zip(at[1].tolist(), at[2].tolist(), strict=True)) == piece


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_begun_epochs_and_what_they_leave_are_counted_as_enumerated(data: st.DataObject) -> None:
    """Also for draws that are more uneven over the lanes than those of any run."""
    samples, lanes = data.draw(st.sampled_from([(5, 2), (31, 2), (40, 2), (50, 3), (64, 4), (97, 6)]))
    drawn = np.array(data.draw(st.lists(st.integers(0, 2 * samples), min_size=lanes, max_size=lanes)))
    source = SourceOrder("a", np.array([samples]), lanes, 0)
    lane, draw = np.zeros(drawn.sum(), np.int64), np.arange(drawn.sum())
    if not source.interleaved:
        lane = np.repeat(np.arange(lanes), drawn)
        draw = np.concatenate([np.arange(n) for n in drawn])
    visited = set()
    if draw.size:
        epoch, _, index = SampleLocator([source]).refs(np.zeros_like(lane), lane, draw)
        visited = set(zip(epoch.tolist(), index.tolist(), strict=True))
    assert len(visited) == drawn.sum()
    epochs = max((epoch + 1 for epoch, _ in visited), default=0)
    assert source.layout.begun_epochs(drawn) == (epochs, epochs * samples - len(visited))


def test_many_sources_at_their_true_size_are_each_what_they_are_alone() -> None:
    """Sources with runs of 1, 2 and 3 samples, interleaved sources and one-sample sources in one call."""
    sizes = [1, 7, 900, 20_000, 33_001, 50_000, 80_003]
    sources = [SourceCounts(f"s{k}", np.array([n // 3, 0, n - n // 3])) for k, n in enumerate(sizes)]
    lanes = 300
    together = StreamOrder(sources, lanes, lanes, 9)
    assert {(s.run, s.interleaved, bool(s.windows)) for s in together.sources} >= {
        (1, True, False), (1, False, True), (2, False, False), (3, False, False), (4, False, True)
    }  # fmt: skip
    random = np.random.RandomState(0)
    source, lane = random.randint(0, len(sizes), 4000), random.randint(0, lanes, 4000)
    draw = random.randint(0, 3_000, 4000)
    found = together._locator.refs(source, lane, draw)
    for k, alone in enumerate(sources):
        mine = source == k
        locator_alone = StreamOrder([alone], lanes, lanes, 9)._locator
        want = locator_alone.refs(np.zeros(mine.sum(), np.int64), lane[mine], draw[mine])
        for ours, theirs in zip(found, want, strict=True):
            assert np.array_equal(ours[mine], theirs)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("sizes", [(100, 400, 2500), (36, 1, 49)])
def test_shares_by_the_square_root_of_size_are_exact_for_squares(sizes: tuple[int, ...]) -> None:
    sources = tuple(Source(f"s{k}", (n,)) for k, n in enumerate(sizes))
    mixture = Mixture(0, sources, {0: 8}, by_sqrt=True)
    ours = order(mixture, 2, 1)
    roots = [round(n**0.5) for n in sizes]
    assert [w * sum(roots) for w in ours.weights] == [r * sum(ours.weights) for r in roots]
    for step, want in enumerate(simulate_order([mixture], 12, 2, 1, short_runs)):
        assert rows(ours, step) == want


def test_shares_by_the_square_root_of_any_size_are_close() -> None:
    sizes = [10, 3_000_000_007, 413_000_000, 1]
    sources = [
        SourceCounts(f"s{k}", np.array([n]), repeat=0.5 if k == 2 else None) for k, n in enumerate(sizes)
    ]
    weights = np.array(StreamOrder(sources, 8, None, 0, "sqrt").weights)
    want = np.sqrt([10, 3_000_000_007, 413_000_000 / 2, 1])
    assert abs(weights / weights.sum() - want / want.sum()).max() < 1e-9
    assert (
        StreamOrder(sources, 8, None, 0, "sqrt").samples_per_epoch() == 10 + 3_000_000_007 + 206_500_000 + 1
    )
