"""BatchSchedule against a list of the rows at every step; division of its batches over ranks."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.batches.spec import SourceSpec, StreamSpec
from data_pipeline.batches.work_items import items_of
from data_pipeline.errors import UserError
from data_pipeline.order.batch_schedule import BatchSchedule
from data_pipeline.transforms.text_formats import PackedFormat

SCHEDULES = st.dictionaries(st.integers(1, 25), st.integers(1, 9), max_size=4).flatmap(
    lambda later: st.integers(1, 9).map(lambda rows: {0: rows, **later})
)


def spec(batch: Any) -> StreamSpec:
    return StreamSpec("pairs", 0, {"a": SourceSpec("a")}, BatchSchedule.of(batch), text=PackedFormat(8))


@given(SCHEDULES, st.integers(0, 60))
def test_rows_are_those_of_the_list_of_steps(schedule: dict[int, int], number: int) -> None:
    batches = BatchSchedule.of(
        json.loads(json.dumps(BatchSchedule.of(schedule).to_json()))
    )  # as a checkpoint keeps it
    assert batches == BatchSchedule.of(schedule)
    listed = [schedule[max(first for first in schedule if first <= step)] for step in range(70)]
    assert [batches.at(step) for step in range(70)] == listed
    assert batches.before(number) == sum(listed[:number])
    assert batches.steps(number) == next(n for n in range(70) if sum(listed[:n]) >= number)
    assert batches.largest == max(schedule.values())
    assert batches.divisor == max(d for d in range(1, 10) if all(n % d == 0 for n in schedule.values()))
    assert batches.steps(-number) == 0


def test_a_number_is_the_same_batch_always() -> None:
    assert BatchSchedule.of(8) == BatchSchedule.of({0: 8})
    assert BatchSchedule.of(8).to_json() == 8
    assert [BatchSchedule.of(8).steps(samples) for samples in (0, 1, 8, 9)] == [0, 1, 1, 2]


def test_a_schedule_reads_as_it_is_written() -> None:
    ramp = BatchSchedule.of({1000: 4096, 0: 1024})
    assert (str(ramp), ramp.to_json()) == ("{0: 1024, 1000: 4096}", {"0": 1024, "1000": 4096})
    assert (str(BatchSchedule.of(8)), BatchSchedule.of(ramp)) == ("8", ramp)


def test_whole_numbers_of_any_kind_are_rows() -> None:
    assert BatchSchedule.of(np.int64(8)) == BatchSchedule.of({"0": np.int32(8)}) == BatchSchedule.of(8)
    assert type(BatchSchedule.of(np.int64(8)).rows[0]) is int


@pytest.mark.parametrize(
    "batch", [8.0, True, "8 rows", {0: 8.5}, {0: 8, 2.5: 9}, {0: 8, True: 9}, {0: 8, "0": 9}]
)
def test_what_is_no_whole_number_is_refused(batch: Any) -> None:
    with pytest.raises(UserError, match=r"batch: .*(not a whole number|twice)"):
        BatchSchedule.of(batch)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({}, "the first steps are missing"),
        ({1: 8}, "the first steps are 1; they must start at 0 and increase"),
        ({-1: 8, 0: 8}, "the first steps are -1, 0; they must start at 0"),
        ({0: 0}, "batch is 0; it must be at least 1"),
        ({0: 8, 5: -8}, "batch is -8; it must be at least 1"),
        (0, "batch is 0; it must be at least 1"),
    ],
)
def test_what_is_no_schedule_is_refused(batch: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        BatchSchedule.of(batch)


@pytest.mark.parametrize("first", [(0, 0), (0, 5, 5), (0, 5, 4)])
def test_first_steps_increase(first: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="they must start at 0 and increase"):
        BatchSchedule(first, (8,) * len(first))


def test_ranks_share_every_batch_of_a_schedule() -> None:
    ramp = spec({0: 4, 2: 6})
    for step, rows in enumerate([4, 4, 6, 6]):
        items = [item for rank in range(4) for item in items_of([ramp], step, rank, 4, micro_batch=1)]
        served = [row for item in items for row in range(item.start, item.stop)]
        assert served == list(range(rows))
        assert [item.stop - item.start + item.dummies for item in items] == [1] * len(items)
        assert len(items) == (
            4 if rows == 4 else 8
        )  # two for each rank: two ranks have two rows, two have one
