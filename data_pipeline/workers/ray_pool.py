"""Steps of a rank whose batches are made by Ray actors, spread over the nodes of a cluster."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np

from data_pipeline import activity
from data_pipeline.activity import Sample
from data_pipeline.batches.spec import Batch
from data_pipeline.batches.work_items import BuilderSetup, WorkItem
from data_pipeline.errors import UserError, WorkerError
from data_pipeline.workers.isolation import ISOLATION_TRIES, LOOK, Isolation, place, stalled
from data_pipeline.workers.process_pool import DEATHS
from data_pipeline.workers.watchdog import StallLimits, StallWatch, log
from data_pipeline.workers.worker import Condemned, Makers, portable
from data_pipeline.workers.worker_handle import SetupFile


class BatchActor:
    """The actor: makes batches as a local worker does. Errors are returned, since Ray would rename them."""

    def __init__(
        self, setups: Sequence[BuilderSetup], folder: str, limits: StallLimits, condemned: Condemned
    ) -> None:
        """`folder` is the rank's: relative paths start there, while Ray starts an actor where its node was started."""
        with suppress(OSError):  # a node with other disks; paths to an object store need no folder
            os.chdir(folder)
        self._setups, self._limits = list(setups), limits
        self._makers = Makers(self._setups)
        self._makers.condemn(condemned)
        self._status = activity.own()
        self._warnings: list[str] = []
        who = f"actor {os.getpid()} on {socket.gethostname()}"
        self._watch = StallWatch(limits, who, partial(place, self._setups), self._warnings.append)

    def make(self, item: WorkItem) -> Batch | Exception:
        try:
            return self._makers[item.stream].make(item.step, item.start, item.stop)
        except Exception as error:
            return portable(error)

    def make_alone(self, item: WorkItem) -> tuple[Batch | Exception, Condemned]:
        """Row by row in processes that may die; also what was found out about samples."""
        file = SetupFile(self._setups)
        isolation = Isolation(self._setups, file, self._limits)
        try:
            return isolation.make(item), {item.stream: isolation.condemned}
        except Exception as error:
            return portable(error), {}
        finally:
            file.close()

    def condemn(self, found: Condemned) -> None:
        self._makers.condemn(found)

    def stalls(self) -> tuple[list[str], str | None]:
        """What to warn of, and what takes too long. Called while the actor is at work."""
        told = self._watch.see(activity.read_status(self._status))
        said, self._warnings[:] = list(self._warnings), []
        return said, told

    def place(self) -> tuple[str, int]:
        """Node and process of this actor."""
        import ray

        return ray.get_runtime_context().get_node_id(), os.getpid()


@dataclass
class _Asked:
    item: WorkItem
    actor: int
    reference: Any
    deaths: int = 0
    stalls: int = 0
    alone: bool = False


class RayPool:
    """Actors that take turns; one that dies, with its node or alone, is replaced and its items are made again."""

    ahead = 2

    def __init__(
        self, setups: Sequence[BuilderSetup], actors: int, first: int, limits: StallLimits | None = None
    ) -> None:
        """`first` says at which node to begin, so that ranks begin at different ones."""
        self._ray = _connect()
        self._limits = limits or StallLimits()
        self._condemned: dict[str, dict[Sample, str]] = {}
        self._setups = self._ray.put(list(setups))
        self._hired = first
        self._actors = [self._hire() for _ in range(max(1, actors))]
        self._asked: dict[int, _Asked] = {}
        self._next = 0

    def submit(self, item: WorkItem, pieces: int = 1) -> int:
        ticket, self._next = self._next, self._next + 1
        actor = ticket % len(self._actors)
        self._asked[ticket] = _Asked(item, actor, self._actors[actor].make.remote(item))
        return ticket

    def result(self, ticket: int) -> Batch:
        asked = self._asked[ticket]
        while True:
            try:
                stall = self._wait(asked)
                if stall is None:
                    found = self._ray.get(asked.reference)
                    break
                asked.stalls += 1
                if asked.stalls >= DEATHS:
                    raise stalled(asked.item, stall)
            except self._ray.exceptions.RayTaskError:
                raise
            except self._ray.exceptions.RayError as error:
                asked.deaths += 1
                if asked.deaths >= DEATHS + ISOLATION_TRIES:
                    raise WorkerError(
                        f"{asked.item} could not be made by {asked.deaths} Ray actors in turn; nothing was replaced. "
                        f"The last error: {error}"
                    ) from error
                asked.alone = asked.deaths >= DEATHS
            self._replace(asked.actor)
        del self._asked[ticket]
        if asked.alone:
            found, condemned = found
            self._condemn(condemned)
        if isinstance(found, Exception):
            raise found
        return _writable(found)

    def _wait(self, asked: _Asked) -> str | None:
        """Until an item is made, or its actor is dead; what takes too long there, in words, if something does."""
        while not self._ray.wait([asked.reference], timeout=min(LOOK, self._limits.warn))[0]:
            watching = self._actors[asked.actor].stalls.options(concurrency_group="watch").remote()
            if self._ray.wait([watching], timeout=LOOK)[0]:
                said, told = self._ray.get(watching)
                for line in said:
                    log.warning(line)
                if told:
                    return str(told)
        return None

    def _condemn(self, found: Condemned) -> None:
        """Tell all actors, now and later, what they must not decode."""
        for stream, samples in found.items():
            self._condemned.setdefault(stream, {}).update(samples)
        if any(found.values()):
            for actor in self._actors:
                actor.condemn.remote(found)

    def cancel(self) -> None:
        for asked in self._asked.values():
            with suppress(self._ray.exceptions.RayError):
                self._ray.cancel(asked.reference)
        self._asked.clear()

    def close(self) -> None:
        self.cancel()
        for actor in self._actors:
            with suppress(self._ray.exceptions.RayError):
                self._ray.kill(actor)
        self._actors.clear()

    def places(self) -> list[tuple[str, int]]:
        """(node, process) of every actor."""
        found: list[tuple[str, int]] = self._ray.get([actor.place.remote() for actor in self._actors])
        return found

    def _hire(self) -> Any:
        # No CPU of its own: so an actor fits beside ranks that have taken them all. But Ray's SPREAD, and now and
        # then a soft affinity, puts actors that ask for nothing on one node; hence each node in turn, by name. If
        # that node is gone, the actor dies unborn and its replacement goes to the next.
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        alive = [node for node in self._ray.nodes() if node["Alive"]]
        nodes = sorted(node["NodeID"] for node in alive if node["Resources"].get("CPU")) or [
            alive[0]["NodeID"]
        ]
        strategy = NodeAffinitySchedulingStrategy(nodes[self._hired % len(nodes)], soft=False)
        self._hired += 1
        builder = self._ray.remote(
            num_cpus=0, max_restarts=0, scheduling_strategy=strategy, concurrency_groups={"watch": 1}
        )(BatchActor)
        return builder.remote(self._setups, os.getcwd(), self._limits, self._condemned)

    def _replace(self, number: int) -> None:
        """A new actor for a dead one, and everything that the dead one had not handed over asked again."""
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._actors[number])
        self._actors[number] = self._hire()
        for asked in self._asked.values():
            if asked.actor == number:
                actor = self._actors[number]
                asked.reference = (actor.make_alone if asked.alone else actor.make).remote(asked.item)


def _connect() -> Any:
    """The ray module, connected: to this process's cluster, else to RAY_ADDRESS, else to one on this machine."""
    try:
        import ray
    except ImportError:
        raise UserError("loader.backend: ray needs Ray; install it: pip install 'dromos[ray]'") from None
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "auto")
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError) as error:
            raise UserError(
                f"loader.backend: ray: no Ray cluster at {address} ({error}). Set RAY_ADDRESS, or start one with "
                "`ray start --head`, or run with --on ray, or choose loader.backend: local"
            ) from error
        if threading.current_thread() is threading.main_thread():
            # ray.init ends the process on SIGTERM; a rank means to save first.
            signal.signal(signal.SIGTERM, on_sigterm)
    return ray


def _writable(batch: Batch) -> Batch:
    """Arrays of its own: Ray's lie in the shared object store, may not be written, and would keep it full."""
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, np.ndarray):
            setattr(batch, field.name, value.copy())
    return batch
