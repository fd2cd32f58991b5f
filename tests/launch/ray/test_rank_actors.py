"""A Ray job's group of ranks: signals, polls and kills reach all that run."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from launch.ray.driver import RayGroup
from launch.supervise.rank_group import LOST
from tests.support import counted_ray


class RankOnNode:
    """An actor's rank; the test sets its exit code."""

    started = 0

    def __init__(self) -> None:
        self.number = RankOnNode.started
        RankOnNode.started += 1
        self.code: int | None = None

    def location(self) -> tuple[str, str, list[str]]:
        return f"node{self.number // 2}", f"10.0.0.{self.number // 2}", [str(self.number % 2)]

    def port(self, host: str) -> int:
        return 4000 + self.number

    def start(self, command: list[str], env: dict[str, str], log: str, workdir: str) -> int:
        return self.number

    def poll(self) -> int | None:
        return self.code

    def send(self, number: int) -> None: ...

    def kill(self) -> None: ...

    def tail(self) -> str:
        return f"log of {self.number}"


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> counted_ray.Ray:
    RankOnNode.started = 0
    return counted_ray.install(monkeypatch, RankOnNode)


def group(ray: counted_ray.Ray, size: int = 4) -> RayGroup:
    return RayGroup([ray.remote(RankOnNode).remote() for _ in range(size)])


def test_a_signal_reaches_every_rank_that_runs_and_the_codes_are_those_of_all(ray: counted_ray.Ray) -> None:
    ranks = group(ray)
    made: list[Any] = [actor.made for actor in ray.actors]
    assert ranks.codes() == {}
    made[2].code = 75
    assert ranks.codes() == {2: 75}
    ranks.send(signal.SIGTERM)
    assert [actor.of("send") for actor in ray.actors] == [
        [(signal.SIGTERM,)],
        [(signal.SIGTERM,)],
        [],
        [(15,)],
    ]
    made[0].code = made[3].code = 0
    made[1].code = -9
    assert ranks.codes() == {0: 0, 1: -9, 2: 75, 3: 0}
    ranks.kill()  # also what a rank that has ended left in its session
    assert [len(actor.of("kill")) for actor in ray.actors] == [1, 1, 1, 1]


@pytest.mark.parametrize("lost", range(4))
def test_a_lost_actor_hides_no_other_one(ray: counted_ray.Ray, lost: int) -> None:
    ranks = group(ray)
    ray.actors[lost].dead = True
    ended = (lost + 2) % 4
    ray.actors[ended].made.code = 75
    assert ranks.codes() == {lost: LOST, ended: 75}
    ranks.send(signal.SIGTERM)
    ranks.kill()
    others = [actor for number, actor in enumerate(ray.actors) if number != lost]
    assert [len(actor.of("send")) for actor in others if actor is not ray.actors[ended]] == [1, 1]
    assert [len(actor.of("kill")) for actor in others] == [1, 1, 1]
    assert ranks.tail(lost) == "(its node does not respond)"
    assert ranks.tail((lost + 1) % 4) == f"log of {(lost + 1) % 4}"
