"""Order state of a checkpoint, the errors when data or recipe changed, and the number of lanes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.order.batch_schedule import BatchSchedule
from data_pipeline.order.state import ResumeResult, Segment
from data_pipeline.order.stream_order import SourceCounts, StreamOrder, choose_lanes
from tests.support.damaged_json import Missing, at, damaged

PRINTS = {"a": "f1", "b": "f2"}


def order(
    counts_b: list[int] | None = None, seed: int = 7, batch: int = 16, lanes: int = 8, **b: Any
) -> StreamOrder:
    sources = [SourceCounts("a", np.array([60, 40]), weight=1)]
    sources.append(SourceCounts("b", np.array(counts_b or [50, 0, 50]), **{"weight": 3, **b}))
    return StreamOrder(sources, batch, lanes, seed)


def only_a(segments: Sequence[Segment] = ()) -> StreamOrder:
    return StreamOrder([SourceCounts("a", np.array([60, 40]))], 16, 8, 7, segments=segments)


def test_state_survives_json_and_fits_the_same_order() -> None:
    state = json.loads(json.dumps(order().state(10, PRINTS)))
    assert order().resume(state, PRINTS) == ((), [])
    assert state["step"] == 10
    assert state["consumed"] == {"a": 40, "b": 120}
    (segment,) = state["segments"]
    assert {"first_step", "mixture_hash", "fingerprints", "consumed_per_lane", "base"} <= set(segment)


@pytest.mark.parametrize(
    ("other", "prints", "words"),
    [
        ({"seed": 8}, PRINTS, ["seed", "0000000000000007", "0000000000000008"]),
        ({"batch": 32}, PRINTS, ["batch changed from 16 to 32"]),
        ({"lanes": 4}, PRINTS, ["lanes changed from 8 to 4"]),
        ({"weight": 2}, PRINTS, ["weights of source 'b' changed from 3 to 2"]),
        ({"counts_b": [50, 1, 50]}, PRINTS, ["samples of source 'b' changed from 100 to 101"]),
        ({"counts_b": [50, 50, 0]}, PRINTS, ["mixture_hash changed from"]),
        ({"max_epochs": 9}, PRINTS, ["max_epochs of source 'b' changed from None to 9"]),
        ({}, {"a": "f1", "b": "f3"}, ["fingerprints of source 'b' changed from f2 to f3"]),
        (None, {"a": "f1"}, ["'b' changed from 100 to no such source"]),
    ],
)
def test_any_change_is_refused_with_both_values(
    other: dict[str, Any] | None, prints: dict[str, str], words: list[str]
) -> None:
    now = only_a() if other is None else order(**other)
    with pytest.raises(UserError) as caught:
        now.resume(order().state(10, PRINTS), prints)
    assert all(word in str(caught.value) for word in [*words, "run.accept_change"])


@pytest.mark.parametrize("other", [{"seed": 8}, {"lanes": 4}, {"seed": 8, "lanes": 4, "weight": 2}])
def test_seed_and_lanes_cannot_change_whatever_is_accepted(other: dict[str, int]) -> None:
    with pytest.raises(
        UserError, match=r"changed from .* cannot change during a run.*new run folder"
    ) as caught:
        order(**other).resume(order().state(10, PRINTS), PRINTS, accept_change=True)
    assert ("seed changed" in str(caught.value)) == ("seed" in other)
    assert ("lanes changed from 8 to 4" in str(caught.value)) == ("lanes" in other)
    assert "weights" not in str(caught.value)


def accepted(before: StreamOrder, after: StreamOrder, step: int = 10) -> ResumeResult:
    return after.resume(before.state(step), accept_change=True)


def test_accepted_changes_are_told_with_what_they_leave_unread() -> None:
    """10 steps draw 40 samples of a and 120 of b, which has 100: 80 of its second epoch are left."""
    left = "80 samples of unfinished epochs will not be used"
    fewer = accepted(order(), order(counts_b=[50, 0, 49]))
    assert fewer.changes[0] == "samples of source 'b' changed from 100 to 99"
    assert fewer.changes[-1] == f"source 'b': {left}; the new data starts at epoch 2"
    removed = accepted(order(), only_a())
    assert removed.changes[-1] == f"source 'b': removed; {left}"
    weights = accepted(order(), order(weight=2))
    assert [line.partition(" changed")[0] for line in weights.changes] == [
        "weights of source 'b'", "mixture_hash"
    ]  # fmt: skip
    added = accepted(only_a(), order())
    assert added.changes[0] == "samples of source 'b' changed from no such source to 100"
    assert len(added.changes) == 2
    for found, unvisited in ((fewer, {"b": 80}), (removed, {"b": 80}), (weights, {}), (added, {})):
        assert len(found.segments) == 2
        assert (found.segments[-1].first_step, found.segments[-1].unvisited) == (10, unvisited)


def test_a_source_that_comes_back_goes_on_where_it_was() -> None:
    """Its samples are the same as before it was removed, so its draws continue; with other samples it starts anew."""
    without_b = only_a(accepted(order(), only_a()).segments)
    for counts_b, first, epoch, drawn in (([50, 0, 50], 0, 0, 120), ([50, 50, 0], 2, 2, 0)):
        again = order(counts_b=counts_b).resume(without_b.state(13), accept_change=True)
        base = again.segments[-1].base
        assert (base["a"].segment, base["a"].first_epoch) == (0, 0)
        assert (base["b"].segment, base["b"].first_epoch) == (first, epoch)
        assert again.segments[-1].unvisited == {}  # what b left was told when it was removed
        back = StreamOrder(
            [SourceCounts("a", np.array([60, 40]), weight=1), SourceCounts("b", np.array(counts_b), weight=3)],
            16, 8, 7, segments=again.segments,
        )  # fmt: skip
        assert back.consumed(13) == {"a": 40 + 3 * 16, "b": 120}
        epochs = back.refs(13).epoch[back.refs(13).source == 1]
        assert set(epochs.tolist()) == {(drawn // 100) + epoch}


def test_samples_are_compared_by_fingerprints_where_both_have_them() -> None:
    state = order().state(10, PRINTS)
    assert order().resume(state, {}).changes == order().resume(state, {"a": "f1"}).changes == []
    assert order().resume(order().state(10), PRINTS).changes == []
    for prints in ({"b": "f3"}, {"a": "f1", "b": "f3"}):
        found = order().resume(state, prints, accept_change=True)
        assert found.changes[0] == "fingerprints of source 'b' changed from f2 to f3"
        assert found.segments[-1].base["b"].segment == 1
        assert found.segments[-1].base["a"].segment == 0


@pytest.mark.parametrize(
    ("other", "prints", "renewed"),
    [
        (order(weight=2), PRINTS, ""),
        (order(), {"a": "f1", "b": "f3"}, "b"),
        (order(), {"a": "f0", "b": "f2"}, "a"),
        (order(), {"a": "f2", "b": "f1"}, "ab"),
        (order(counts_b=[50, 50, 0]), PRINTS, "b"),
        (order(counts_b=[50, 0, 51]), PRINTS, "b"),
    ],
)
def test_a_source_whose_samples_changed_starts_a_new_pass_and_no_other_does(
    other: StreamOrder, prints: dict[str, str], renewed: str
) -> None:
    """Counts by shard and fingerprint tell; before step 10 one pass over `a` and two over `b` have begun."""
    segments, _ = other.resume(order().state(10, PRINTS), prints, accept_change=True)
    for name, begun in (("a", 1), ("b", 2)):
        base = segments[-1].base[name]
        assert (base.segment, base.first_epoch) == ((1, begun) if name in renewed else (0, 0))
        assert (name in segments[-1].unvisited) is (name in renewed)


CANNOT_BE_READ = r"cannot be read \((.*)\): another version of dromos wrote it, or it is damaged"


def test_what_is_no_state_is_refused() -> None:
    whole = order().state(10, PRINTS)
    segment = whole["segments"][0]
    older = {key: segment[key] for key in ("first_step", "mixture_hash", "fingerprints", "samples")}
    broken: list[tuple[Any, str]] = [
        ([], r"it is \[\], not an object"),
        ({"step": 3}, "consumed_per_lane is missing"),
        (whole | {"segments": [older]}, r"segments\[0\].base is missing"),
        (whole | {"segments": [segment | {"more": 1}]}, r"segments\[0\].more is unknown"),
        (whole | {"segments": []}, "segments is"),
        (whole | {"segments": [segment | {"first_step": 11}]}, "first_step of the segments"),
        (whole | {"segments": [segment, segment | {"consumed_per_lane": 99}]}, "not at 99 and ascending"),
        (whole | {"segments": [segment | {"sources": ["a"]}]}, "samples has the sources a, b, not a"),
        (whole | {"segments": [segment | {"cycles": [[0, [0, 0]]]}]}, r"cycles\[0\] is \[0, 0\], not 2 weights"),
        (whole | {"segments": [segment | {"cycles": [[0, [2**31, 1]]]}]}, "with a sum from 1 to 2147483648"),
        (whole | {"segments": [segment, segment | {"first_step": 11}]}, r"first_step of the segments is \[0, 11\]"),
        (whole | {"segments": [segment | {"cycles": [[0, [1, 3]], [5, [1, 0]], [4, [0, 1]]]}]}, "begin at .0, 5, 4"),
        (whole | {"segments": [segment | {"sources": ["a", "b", "b"]}]}, "not a list of different names"),
        (whole | {"segments": [segment | {"samples": {"a": 0, "b": 100}}]}, "samples.a is 0, not a whole number of at"),
        (whole | {"step": "10"}, "step is '10', not a whole number of at least 0"),
        (whole | {"step": 2**60}, "step is"),
        (whole | {"seed": "7"}, "seed is '7', not 16 hex digits"),
        (whole | {"batch": "many"}, "batch: 'many' is not a whole number"),
    ]  # fmt: skip
    for base, words in (
        ({"segment": 1}, "at most 0"),
        ({"passes": "1/0"}, "fraction"),
        ({"passes": "-1"}, "at least 0"),
    ):
        bases = segment["base"] | {"a": {"segment": 0, "first_epoch": 0, "passes": "0"} | base}
        broken.append((whole | {"segments": [segment | {"base": bases}]}, words))
    for state, words in broken:
        with pytest.raises(UserError, match=CANNOT_BE_READ) as caught:
            order().resume(state, PRINTS)
        assert re.search(words, str(caught.value)), (words, str(caught.value))


@pytest.mark.parametrize("accept", [False, True])
def test_damage_at_any_place_is_refused_and_named(accept: bool) -> None:
    """A place of a state with two segments is missing, of another type or negative; other texts are compared."""
    segments = order(weight=2).resume(order().state(10, PRINTS), PRINTS, accept_change=True).segments
    sources = [
        SourceCounts("a", np.array([60, 40]), weight=1),
        SourceCounts("b", np.array([50, 0, 50]), weight=2),
    ]
    now = StreamOrder(sources, 16, 8, 7, segments=segments)
    whole = json.loads(json.dumps(now.state(20, PRINTS)))
    resumed = now.resume(whole, PRINTS).segments
    assert resumed == tuple(Segment.from_json(fields) for fields in whole["segments"])
    for place, value, state in damaged(whole):
        # `consumed` is for people. A stream may have no fingerprints, and one segment.
        optional = value is Missing and (place[-2:-1] == ("fingerprints",) or place == ("segments", 1))
        if place[0] == "consumed" or optional:
            continue
        if type(value) is type(at(whole, place)) and value != -1:
            with suppress(UserError):
                now.resume(state, PRINTS, accept_change=accept)
        else:
            with pytest.raises(UserError, match=CANNOT_BE_READ):
                now.resume(state, PRINTS, accept_change=accept)


def test_lanes_default_to_the_largest_divisor_up_to_1024() -> None:
    assert [
        choose_lanes(BatchSchedule.of(batch), None) for batch in (1, 7, 256, 1024, 65_536, 1500, 2 * 1031)
    ] == [
        1,
        7,
        256,
        1024,
        1024,
        750,
        2,
    ]
    assert choose_lanes(BatchSchedule.of(256), 64) == 64
    assert choose_lanes(BatchSchedule.of({0: 96, 5: 144}), None) == 48
    with pytest.raises(
        UserError, match=r"32 does not divide every batch of \{0: 96, 5: 144\}; .* that does is 24"
    ):
        choose_lanes(BatchSchedule.of({0: 96, 5: 144}), 32)
    for lanes in (0, -8):
        with pytest.raises(UserError, match=f"lanes: {lanes} does not divide .* that does is 1"):
            choose_lanes(BatchSchedule.of(256), lanes)
    with pytest.raises(
        UserError, match="100 does not divide the batch of 256; the nearest number that does is 128"
    ):
        choose_lanes(BatchSchedule.of(256), 100)
    with pytest.raises(UserError, match="batch is 0"):
        choose_lanes(BatchSchedule.of(0), None)


@pytest.mark.parametrize(("step", "start", "stop"), [(-1, 0, 4), (0, -1, 4), (0, 5, 4), (0, 0, 17)])
def test_rows_outside_the_batch_are_refused(step: int, start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="batches of 16"):
        order().refs(step, start, stop)


def test_an_empty_slice_is_empty() -> None:
    assert all(
        getattr(order().refs(3, 5, 5), field).size == 0
        for field in ("row", "source", "epoch", "shard", "index")
    )


def test_steps_of_a_length_count_the_batches_before_a_change() -> None:
    ramp, step = {0: 8, 4: 24, 9: 16}, 5
    sources = [SourceCounts("a", np.array([60, 40]))]
    state = StreamOrder(sources, 8, 8, 7).state(step)
    resumed = StreamOrder(sources, ramp, 8, 7).resume(state, accept_change=True)
    changed = StreamOrder(sources, ramp, 8, 7, segments=resumed.segments)
    rows = [8] * step + [BatchSchedule.of(ramp).at(later) for later in range(step, 30)]
    for samples in range(sum(rows[:step]), sum(rows)):
        assert changed.steps(samples) == next(n for n in range(31) if sum(rows[:n]) >= samples)
    assert changed.steps(1) == step  # over, wherever it was
    first = StreamOrder(sources, ramp, 8, 7)
    assert [first.steps(n) for n in range(300)] == [BatchSchedule.of(ramp).steps(n) for n in range(300)]
