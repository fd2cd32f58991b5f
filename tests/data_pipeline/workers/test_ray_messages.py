"""What a Ray pool sends reaches every actor that needs it: items, repeats after a death, bad samples, the end."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from data_pipeline.batches.spec import Batch
from data_pipeline.batches.work_items import WorkItem
from data_pipeline.workers.ray_pool import RayPool
from tests.support import counted_ray
from tests.support.fake_training import batch

BAD = ("even", 0, 3)


class Builder:
    """What an actor does here: it makes the batch of an item; alone, it finds that a sample is bad."""

    def __init__(self, setups: Any, folder: str, limits: Any, known_bad: dict[str, dict[Any, str]]) -> None:
        self.known_bad = {stream: dict(samples) for stream, samples in known_bad.items()}

    def make(self, item: WorkItem) -> Batch:
        return batch(item.stream, item.step, item.start, item.stop)

    def make_isolated(self, item: WorkItem) -> tuple[Batch, dict[str, dict[Any, str]]]:
        return self.make(item), {item.stream: {BAD: "decoder crash"}}

    def add_known_bad(self, known_bad: dict[str, dict[Any, str]]) -> None:
        for stream, samples in known_bad.items():
            self.known_bad.setdefault(stream, {}).update(samples)

    def location(self) -> tuple[str, int]:
        return "node", id(self)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> counted_ray.Ray:
    return counted_ray.install(monkeypatch, Builder)


def item(step: int) -> WorkItem:
    return WorkItem("pairs", step, 0, 4)


def asked(actor: counted_ray.Actor, method: str = "make") -> list[int]:
    """Steps of the items that an actor was asked for."""
    return [work.step for (work,) in actor.of(method)]


def test_items_go_to_all_actors_in_turn_and_every_ticket_gets_its_own(ray: counted_ray.Ray) -> None:
    pool = RayPool([], 3, first_node=1)
    tickets = [pool.submit(item(step)) for step in range(8)]
    for step in (5, 0, 7, 1, 6, 2, 4, 3):
        assert pool.result(tickets[step]).step == step
    assert [asked(actor) for actor in ray.actors] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    nodes = [actor.options["scheduling_strategy"].given[0] for actor in ray.actors]
    assert nodes == ["n1", "n0", "n1"]
    assert len(set(pool.locations())) == 3


def test_every_item_of_a_dead_actor_is_built_again_and_no_other(ray: counted_ray.Ray) -> None:
    pool = RayPool([], 2, first_node=0)
    tickets = [pool.submit(item(step)) for step in range(8)]
    assert pool.result(tickets[0]).step == 0
    first, second = ray.actors
    first.dead = True
    for step in (3, 6, 2, 1, 7, 5, 4):
        assert pool.result(tickets[step]).step == step
    third = ray.actors[2]
    assert (asked(first), asked(second)) == ([0, 2, 4, 6], [1, 3, 5, 7])
    assert asked(third) == [2, 4, 6]  # the served one is not asked for again
    assert pool.result(pool.submit(item(8))).step == 8
    assert asked(third) == [2, 4, 6, 8]  # it has taken the dead one's place


def test_a_bad_sample_is_known_to_all_actors_and_to_those_that_start_later(
    ray: counted_ray.Ray, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = RayPool([], 3, first_node=0)
    ticket = pool.submit(item(0))
    other = pool.submit(item(1))
    ray.actors[0].dead = True
    monkeypatch.setattr(ray, "wait", _kill_once(ray, 3))  # its replacement dies too: the rows are built alone
    assert pool.result(ticket).step == 0
    running = [ray.actors[1], ray.actors[2], ray.actors[4]]
    assert len(ray.actors) == 5
    assert asked(ray.actors[4], "make_isolated") == [0]
    for actor in running:
        assert actor.of("add_known_bad") == [({"pairs": {BAD: "decoder crash"}},)]
    ray.actors[1].dead = True
    assert pool.result(other).step == 1
    assert ray.actors[5].made.known_bad == {"pairs": {BAD: "decoder crash"}}


def _kill_once(ray: counted_ray.Ray, number: int) -> Any:
    """A `ray.wait` before which the actor `number` dies, once it runs."""
    wait = ray.wait

    def waiting(references: list[Any], timeout: float | None = None) -> Any:
        if len(ray.actors) == number + 1:
            ray.actors[number].dead = True
        return wait(references, timeout)

    return waiting


def test_cancel_drops_every_item_and_close_ends_every_actor(ray: counted_ray.Ray) -> None:
    pool = RayPool([], 3, first_node=0)
    tickets = [pool.submit(item(step)) for step in range(7)]
    pool.result(tickets[2])
    pool.cancel()
    assert Counter(reference.actor for reference in ray.cancelled) == Counter(
        {ray.actors[0]: 3, ray.actors[1]: 2, ray.actors[2]: 1}
    )
    again = pool.submit(item(9))
    assert pool.result(again).step == 9
    pool.close()
    assert ray.killed == ray.actors


def test_items_of_a_cluster_that_is_gone_are_dropped_without_an_error(
    ray: counted_ray.Ray, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[counted_ray.Reference] = []

    def cancel(reference: counted_ray.Reference) -> None:
        asked.append(reference)
        raise counted_ray.RayError("no connection")

    monkeypatch.setattr(ray, "cancel", cancel)
    pool = RayPool([], 1, first_node=0)
    for step in range(2):
        pool.submit(item(step))
    pool.cancel()
    assert len(asked) == 2
    pool.cancel()
    assert len(asked) == 2  # nothing is left
