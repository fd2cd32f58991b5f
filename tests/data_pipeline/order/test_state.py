"""Order state of a checkpoint, the errors when data or recipe changed, and the number of lanes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.order.batch_schedule import BatchSchedule
from data_pipeline.order.stream_order import SourceCounts, StreamOrder, choose_lanes

PRINTS = {"a": "f1", "b": "f2"}


def order(
    counts_b: list[int] | None = None, seed: int = 7, batch: int = 16, lanes: int = 8, **b: Any
) -> StreamOrder:
    sources = [SourceCounts("a", np.array([60, 40]), weight=1)]
    sources.append(SourceCounts("b", np.array(counts_b or [50, 0, 50]), **{"weight": 3, **b}))
    return StreamOrder(sources, batch, lanes, seed)


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
        (order(seed=8), PRINTS, ["seed", "0000000000000007", "0000000000000008"]),
        (order(batch=32), PRINTS, ["batch changed from 16 to 32"]),
        (order(lanes=4), PRINTS, ["lanes changed from 8 to 4"]),
        (order(weight=2), PRINTS, ["weights of source 'b' changed from 3 to 2"]),
        (order(counts_b=[50, 1, 50]), PRINTS, ["samples of source 'b' changed from 100 to 101"]),
        (order(counts_b=[50, 50, 0]), PRINTS, ["mixture_hash changed from"]),
        (order(max_epochs=9), PRINTS, ["max_epochs of source 'b' changed from None to 9"]),
        (order(), {"a": "f1", "b": "f3"}, ["fingerprints of source 'b' changed from f2 to f3"]),
        (
            StreamOrder([SourceCounts("a", np.array([60, 40]))], 16, 8, 7),
            {"a": "f1"},
            ["'b' changed from 100 to no such source"],
        ),
    ],
)
def test_any_change_is_refused_with_both_values(
    other: StreamOrder, prints: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        other.resume(order().state(10, PRINTS), prints)
    assert all(word in str(caught.value) for word in [*words, "run.accept_change"])


def test_what_is_no_state_is_refused() -> None:
    whole = order().state(10, PRINTS)
    older = {
        key: whole["segments"][0][key] for key in ("first_step", "mixture_hash", "fingerprints", "samples")
    }
    broken = [
        {"step": 3},
        whole | {"segments": [older]},
        whole | {"segments": []},
        whole | {"segments": [{"first_step": 0}]},
        whole | {"step": "x"},
    ]
    for state in broken:
        with pytest.raises(UserError, match=r"cannot be read .*another version of dromos wrote it"):
            order().resume(state, PRINTS)


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
