"""The process pool with workers that a test steers: memory is never handed on while somebody writes or reads it."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from data_pipeline.activity import Activity
from data_pipeline.batches.work_items import WorkItem
from data_pipeline.errors import WorkerError
from data_pipeline.workers import shared_memory
from data_pipeline.workers.process_pool import MAX_FAILED_STARTS, SLICES_PER_WORKER, ProcessPool
from data_pipeline.workers.watchdog import StallLimits
from tests.support.steered_workers import Crew, batch_of, buffer_of, item, pixels_of, pool_of


def test_memory_of_a_cancelled_item_waits_for_its_last_writer() -> None:
    with pool_of(2) as (pool, crew):
        cancelled = pool.submit(item(1), slices=2)
        crew.have(2)
        first, second = crew.workers
        pool.cancel()
        with pytest.raises(KeyError):
            pool.result(cancelled)
        ticket = pool.submit(item(2), slices=2)
        crew.have(4)
        assert buffer_of(crew, 2) != buffer_of(crew, 1)
        first.answer()
        crew.have(3)
        other = pool.submit(item(3))  # one of the two writers is still at work
        first.answer()
        crew.have(3)
        assert buffer_of(crew, 3) not in (buffer_of(crew, 1), buffer_of(crew, 2))
        second.scribble(99)
        second.answer()
        crew.have(2)
        while crew.workers[0].pending or crew.workers[1].pending:
            next(worker for worker in crew.workers if worker.pending).answer()
            crew.wait(lambda: not any(worker.answers for worker in crew.workers))
        kept = pool.result(ticket), pool.result(other)
        pool.submit(item(4))
        crew.have(1)
        assert buffer_of(crew, 4) == buffer_of(crew, 1)  # now it is free
        for worker in crew.workers:
            if worker.pending:
                worker.scribble(7)
        for step, batch in zip((2, 3), kept, strict=True):
            np.testing.assert_array_equal(batch.pixels, pixels_of(step, 0, 16))


def test_memory_of_cancelled_items_comes_back_from_dead_workers_too() -> None:
    with pool_of(1) as (pool, crew):
        for step in range(1, 6):
            pool.submit(item(step))
            crew.have(1)
            pool.cancel()
            (old,) = crew.workers
            old.die()
            crew.wait(lambda old=old: old.is_dead and bool(crew.workers))
        ticket = pool.submit(item(7))
        crew.have(1)
        crew.workers[0].answer()
        np.testing.assert_array_equal(pool.result(ticket).pixels, pixels_of(7, 0, 16))
        assert pool.buffer_count == 1
        assert [work.item.step for _, work in crew.events if work] == [1, 2, 3, 4, 5, 7]


@pytest.mark.parametrize("end", ["death", "stall"])
def test_a_replaced_worker_is_dead_before_its_work_is_given_away_and_is_never_heard(end: str) -> None:
    limits = StallLimits(0.01, 1.0) if end == "stall" else None
    with pool_of(1, limits) as (pool, crew):
        ticket = pool.submit(item(1))
        following = pool.submit(item(2))
        crew.have(2)
        (old,) = crew.workers
        old.scribble(99)
        if end == "stall":
            with (
                crew.changed
            ):  # an answer that it wrote, and that the pool has not read when it kills the worker
                old.answers.append((old.pending[0][0].number, batch_of(item(1), pixels_of(9, 0, 16))))
            old.activity = Activity(None, 0.0, ("a", 0, 0), 1e-9)
        else:
            old.die()
        crew.wait(
            lambda: (
                len(crew.workers) == 1 and crew.workers[0] is not old and len(crew.workers[0].pending) == 2
            )
        )
        assert [event for event, _ in crew.events] == ["send 1", "send 1", "kill 1", "send 2", "send 2"]
        assert [work.item.step for _, work in crew.events if work] == [1, 2, 1, 2]  # in the order of need
        assert len({work.number for _, work in crew.events if work}) == 4
        (new,) = crew.workers
        for step, number in ((1, ticket), (2, following)):
            new.answer()
            np.testing.assert_array_equal(pool.result(number).pixels, pixels_of(step, 0, 16))


def test_the_second_stall_of_a_slice_is_an_error_and_the_work_behind_it_goes_on() -> None:
    with pool_of(1, StallLimits(0.01, 1.0)) as (pool, crew):
        ticket, following = pool.submit(item(1)), pool.submit(item(2))
        for _ in range(2):
            crew.have(2)
            (old,) = crew.workers
            old.activity = Activity(None, 0.0, ("a", 0, 0), 1e-9)
            crew.wait(lambda old=old: old.is_dead and bool(crew.workers))
        crew.have(1)
        with pytest.raises(
            WorkerError, match=r"step 1, rows 0 to 15 .*two workers, one after the other, stalled"
        ):
            pool.result(ticket)
        crew.workers[0].answer()
        np.testing.assert_array_equal(pool.result(following).pixels, pixels_of(2, 0, 16))
        assert [work.item.step for _, work in crew.events if work] == [1, 2, 1, 2, 2]


def test_pixels_made_in_isolation_go_to_the_rows_they_belong_to() -> None:
    """The slice in the middle kills two workers; its rows are made one by one and come through the socket."""
    with pool_of(3) as (pool, crew):
        ticket = pool.submit(item(5, 24, start=40), slices=3)
        crew.have(3)
        for _ in range(2):
            victim = next(w for w in crew.workers if w.pending and w.pending[0][0].item.start == 48)
            victim.scribble(99)
            victim.die()
            crew.wait(lambda victim=victim: victim.is_dead)
            crew.have(3)
        while (alone := [w for w in crew.workers if w.pending]) != []:
            worker = alone[0]
            made = worker.answer()
            crew.wait(lambda worker=worker, made=made: all(work.item != made for work, _ in worker.pending))
            if made.start == 55:
                break
        for worker in list(crew.workers):
            if worker.pending:
                worker.answer()
        batch = pool.result(ticket)
        np.testing.assert_array_equal(batch.pixels, pixels_of(5, 40, 64))
        assert (batch.start, batch.stop, batch.sample_ids.tolist()) == (
            40,
            64,
            [5000 + row for row in range(40, 64)],
        )


def test_an_error_of_one_slice_gives_the_memory_back_once() -> None:
    with pool_of(2) as (pool, crew):
        for step in range(3):
            ticket = pool.submit(item(step), slices=2)
            crew.have(2)
            bad, good = crew.workers
            number = bad.pending[0][0].number
            bad._tell((number, WorkerError("broken")))
            good.answer()
            with pytest.raises(WorkerError, match="broken"):
                pool.result(ticket)
            assert pool.buffer_count == 1
        tickets = [pool.submit(item(step)) for step in (7, 8)]
        crew.have(2)
        assert buffer_of(crew, 7) != buffer_of(crew, 8)
        for worker in crew.workers:
            worker.answer()
        for step, ticket in zip((7, 8), tickets, strict=True):
            np.testing.assert_array_equal(pool.result(ticket).pixels, pixels_of(step, 0, 16))


VIEWS: list[Callable[[np.ndarray], Any]] = [
    lambda pixels: pixels,
    lambda pixels: pixels[3:5, ::2],
    lambda pixels: pixels.transpose(0, 3, 1, 2)[-1:],
    lambda pixels: memoryview(pixels)[2:4],
    lambda pixels: pixels.reshape(-1).view(np.uint32),
    lambda pixels: np.frombuffer(pixels.data, np.uint8)[5:],
]


@dataclass
class Story:
    """Random steps of a pool, its workers and a user who keeps views; `deaths` of items, at most one each."""

    pool: ProcessPool
    crew: Crew
    chance: random.Random
    tickets: dict[int, WorkItem] = field(default_factory=dict)
    open: set[tuple[int, int]] = field(default_factory=set)  # (step, first row) of unfinished slices
    cancelled: set[int] = field(default_factory=set)  # steps
    kept: list[tuple[Any, bytes]] = field(default_factory=list)
    deaths: set[tuple[int, int]] = field(default_factory=set)
    events: int = 0  # until the last cancel
    step: int = 0

    def submit(self) -> None:
        self.step += 1
        rows, slices = self.chance.choice([(8, 1), (16, 2), (32, 3), (32, 1)])
        made = item(self.step, rows, self.chance.choice([0, 8, 32]))
        self.tickets[self.pool.submit(made, slices)] = made
        self.open |= {(self.step, made.start + rows * number // slices) for number in range(slices)}
        self.settle()

    def settle(self) -> None:
        """Wait until all works that the workers can hold are with them."""

        def has_settled() -> bool:
            works = [work.item for worker in self.crew.workers for work, _ in worker.pending]
            orphans = sum(work.step in self.cancelled for work in works)
            most = SLICES_PER_WORKER * len(self.crew.workers)
            return (
                len(self.crew.workers) == 3
                and len(works) == min(most, orphans + len(self.open))
                and not any(worker.answers for worker in self.crew.workers)
            )

        self.crew.wait(has_settled)

    def act(self) -> None:
        busy = [worker for worker in self.crew.workers if worker.pending]
        deed = self.chance.choice(["scribble", "scribble", "answer", "answer", "answer", "die", "cancel"])
        if not busy or (deed == "cancel" and self.chance.random() < 0.8):
            return
        worker = self.chance.choice(busy)
        place = worker.pending[0][0].item.step, worker.pending[0][0].item.start
        worker.scribble(self.chance.randrange(251, 256))
        if deed == "answer":
            worker.answer()
            self.open.discard(place)
        elif deed == "die" and place not in self.deaths:
            self.deaths.add(place)
            worker.die()
            self.crew.wait(lambda: worker.is_dead)
        elif deed == "cancel":
            self.pool.cancel()
            self.cancelled |= {made.step for made in self.tickets.values()}
            self.events = len(self.crew.events)
            self.tickets, self.open = {}, set()
        self.settle()

    def take(self) -> None:
        """Take what is finished; keep a view of it, or not."""
        for ticket, made in list(self.tickets.items()):
            if not any(unfinished == made.step for unfinished, _ in self.open):
                del self.tickets[ticket]
                batch = self.pool.result(ticket)
                np.testing.assert_array_equal(batch.pixels, pixels_of(made.step, made.start, made.stop))
                view = self.chance.choice(VIEWS)(batch.pixels)
                self.kept.append((view, np.asarray(view).tobytes()))
        self.chance.shuffle(self.kept)
        del self.kept[self.chance.randrange(1, 6) :]

    def check(self) -> None:
        for view, shown in self.kept:
            assert np.asarray(view).tobytes() == shown
        buffers: dict[int, set[int]] = {}
        for worker in self.crew.workers:
            for work, _ in worker.pending:
                if work.buffer is not None:
                    buffers.setdefault(work.buffer, set()).add(work.item.step)
        assert all(len(steps) == 1 for steps in buffers.values()), "two items share memory"
        sent = {work.item.step for _, work in self.crew.events[self.events :] if work is not None}
        assert not sent & self.cancelled, "a cancelled item is built"


@pytest.mark.parametrize("seed", range(4))
def test_no_memory_is_shared_whatever_workers_and_users_do(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Workers write until they answer or die, items are cancelled, views are kept: every kept byte stays."""
    monkeypatch.setattr(shared_memory, "MAX_BUFFERS", 9)
    with pool_of(3) as (pool, crew):
        story = Story(pool, crew, random.Random(seed))
        for _ in range(120):
            while len(story.tickets) < 4 and story.chance.random() < 0.8:
                story.submit()
            story.act()
            story.take()
            story.check()
        assert story.deaths
        assert story.cancelled
        assert pool.buffer_count <= 9
        # Everything is dropped: each buffer is free once, so items that are built together have different ones.
        pool.cancel()
        for worker in list(crew.workers):
            while worker.pending:
                number = worker.pending[0][0].number
                worker.answer()
                crew.wait(lambda w=worker, n=number: all(work.number != n for work, _ in w.pending))
        story.kept.clear()
        gc.collect()
        for step in range(1000, 1006):
            pool.submit(item(step, 8))
        crew.have(6)
        numbers = [buffer_of(crew, step) for step in range(1000, 1006)]
        assert None not in numbers
        assert len(set(numbers)) == 6


@pytest.mark.parametrize("workers", [1, 2])
def test_a_pool_gives_up_after_a_stated_number_of_workers_that_die_without_work(workers: int) -> None:
    with pool_of(workers) as (pool, crew):
        for number in range(MAX_FAILED_STARTS * workers):
            crew.wait(lambda number=number: crew.started == workers + number)  # type: ignore[misc]
            crew.have(0)
            crew.workers[0].die()
        ticket = pool.submit(item(1))
        with pytest.raises(
            WorkerError, match=r"loader workers die while they start \(.*lower loader\.workers"
        ):
            pool.result(ticket)
        assert crew.started == workers + MAX_FAILED_STARTS * workers - 1
