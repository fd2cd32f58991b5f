"""Supervision of ranks without processes: which signals a group gets, when it is killed, and whose exit code counts."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from launch.supervise import rank_group
from launch.supervise.rank_group import LOST, Outcome, first_failure, group_outcome, supervise

KILLED, TERMINATED = -signal.SIGKILL, -signal.SIGTERM


class Group:
    """Ranks that end as `script` says: poll number -> rank -> exit code. A kill ends the others."""

    poll_seconds = 0.0

    def __init__(self, size: int, script: Mapping[int, Mapping[int, int]]) -> None:
        self.size, self.script = size, script
        self.polls = 0
        self.ended: dict[int, int] = {}
        self.sent: list[int] = []
        self.killed_at: int | None = None

    def codes(self) -> dict[int, int]:
        self.ended |= {r: c for r, c in self.script.get(self.polls, {}).items() if r not in self.ended}
        self.polls += 1
        assert self.polls < 1000, "this would never end"
        return dict(self.ended)

    def send(self, number: int) -> None:
        self.sent.append(number)

    def kill(self) -> None:
        self.killed_at = self.polls
        self.ended = dict.fromkeys(range(self.size), KILLED) | self.ended

    def tail(self, rank: int) -> str:
        return ""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that every poll advances by a second."""
    time = SimpleNamespace(now=0.0)

    def sleep(seconds: float) -> None:
        time.now += 1

    monkeypatch.setattr(rank_group, "time", SimpleNamespace(monotonic=lambda: time.now, sleep=sleep))
    return time


def run(group: Group, stops: tuple[int, ...] = ()) -> tuple[Outcome, list[bool]]:
    """Supervise the group; a stop signal arrives at each of the polls `stops`."""
    stop: Any = SimpleNamespace(count=0)
    told: list[bool] = []

    def tick(stopping: bool) -> None:
        told.append(stopping)
        stop.count = sum(number < group.polls for number in stops)

    return supervise(group, stop, tick), told


def test_all_ranks_end_by_themselves(clock: SimpleNamespace) -> None:
    group = Group(3, {1: {2: 0}, 4: {0: 0}, 30: {1: 0}})
    outcome, told = run(group)
    assert outcome == Outcome(0, None, {0: 0, 1: 0, 2: 0})
    assert group.sent == []
    assert not any(told)


def test_a_stop_is_sent_once_and_a_save_may_take_any_time(clock: SimpleNamespace) -> None:
    group = Group(2, {200: {1: 75}, 300: {0: 75}})
    outcome, told = run(group, stops=(2,))
    assert outcome == Outcome(75, None, {0: 75, 1: 75})
    assert group.sent == [signal.SIGTERM]
    assert told[:3] == [False] * 3
    assert all(told[3:])
    assert len(told) > 300


def test_the_second_stop_kills(clock: SimpleNamespace) -> None:
    group = Group(2, {5: {1: 75}})
    outcome, _ = run(group, stops=(2, 9))
    assert group.sent == [signal.SIGTERM]
    assert group.killed_at is not None
    assert group.killed_at <= 11
    assert outcome == Outcome(1, None, {0: KILLED, 1: 75})


@pytest.mark.parametrize(
    ("script", "code", "failed"),
    [
        ({3: {1: 1}}, 1, 1),
        ({3: {2: 2}, 4: {0: 1}}, 2, 2),  # the first to fail counts, though others fail after it
        (
            {3: {0: 1, 2: KILLED}},
            1,
            2,
        ),  # of two at once, the one that was killed: the other lost its connection
        ({3: {1: LOST, 0: 1}}, 1, 1),
    ],
)
def test_a_failure_kills_the_others_after_a_grace(
    clock: SimpleNamespace, script: dict[int, dict[int, int]], code: int, failed: int
) -> None:
    """Rank 3 waits for the failed one for ever."""
    group = Group(4, script)
    outcome, _ = run(group)
    assert (outcome.code, outcome.failed) == (code, failed)
    assert outcome.codes[3] == KILLED
    assert group.killed_at is not None
    assert 3 + rank_group.FAILURE_GRACE_SECONDS < group.killed_at < 12


def test_a_rank_that_a_stop_ends_before_it_started_is_no_failure_but_ends_its_peers(
    clock: SimpleNamespace,
) -> None:
    group = Group(3, {4: {1: TERMINATED}})
    outcome, _ = run(group, stops=(2,))
    assert (outcome.code, outcome.failed) == (75, None)
    assert outcome.codes == {0: KILLED, 1: TERMINATED, 2: KILLED}


def test_the_ranks_are_killed_when_the_supervisor_fails(clock: SimpleNamespace) -> None:
    group = Group(2, {})

    def broken(stopping: bool) -> None:
        raise RuntimeError("no terminal")

    stop: Any = SimpleNamespace(count=0)
    with pytest.raises(RuntimeError, match="no terminal"):
        supervise(group, stop, broken)
    assert group.ended == {0: KILLED, 1: KILLED}


def test_blame_and_verdict() -> None:
    assert first_failure({0: 0, 1: 75}, stopping=False) is None
    assert first_failure({0: 1, 1: -9}, stopping=False) == 1
    assert first_failure({0: 75, 1: -15}, stopping=True) is None
    assert first_failure({0: 75, 1: -15}, stopping=False) == 1
    assert group_outcome({0: 0, 1: 0}, None, False, False).code == 0
    assert group_outcome({0: 75, 1: 75}, None, False, False).code == 75
    assert group_outcome({0: 0, 1: 75}, None, False, False).code == 75
    assert group_outcome({0: 0, 1: 0}, None, True, False).code == 0  # the ranks were done before the signal
    assert group_outcome({0: 0, 1: -15}, None, True, False).code == 75
    assert group_outcome({0: -9, 1: 2}, 1, False, False) == Outcome(2, 1, {0: -9, 1: 2})
