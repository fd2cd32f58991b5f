"""Pool of Ray actors, spread over the nodes of a cluster, that build the batches of one rank."""

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
from data_pipeline.workers.failures import (
    MAX_ROW_DEATHS,
    MAX_SLICE_DEATHS,
    MAX_SLICE_STALLS,
    POLL_SECONDS,
    describe_rows,
    describe_sample,
    stall_error,
)
from data_pipeline.workers.isolation import Isolation
from data_pipeline.workers.watchdog import Stall, StallLimits, StallWatch, log
from data_pipeline.workers.worker import Builders, KnownBad, picklable_error
from data_pipeline.workers.worker_handle import SetupFile


class BatchActor:
    """The actor: builds batches as a worker process does.

    It returns errors instead of raising them, because Ray changes the type of a raised error.
    """

    def __init__(
        self, setups: Sequence[BuilderSetup], folder: str, limits: StallLimits, known_bad: KnownBad
    ) -> None:
        """`folder`: working directory of the rank, for relative paths; Ray starts actors in the directory in which the
        node was started.
        """
        # The folder may not exist on this node; URLs of an object store need none.
        with suppress(OSError):
            os.chdir(folder)
        self._setups, self._limits = list(setups), limits
        self._builders = Builders(self._setups)
        self._builders.add_known_bad(known_bad)
        self._status = activity.status_memory()
        self._warnings: list[str] = []
        name = f"actor {os.getpid()} on {socket.gethostname()}"
        self._watch = StallWatch(limits, name, partial(describe_sample, self._setups), self._warnings.append)

    def make(self, item: WorkItem) -> Batch | Exception:
        try:
            return self._builders[item.stream].make(item.step, item.start, item.stop)
        except Exception as error:
            return picklable_error(error)

    def make_isolated(self, item: WorkItem) -> tuple[Batch | Exception, KnownBad]:
        """Build an item row by row in throw-away processes. Returns also the bad samples that this found."""
        file = SetupFile(self._setups)
        isolation = Isolation(self._setups, file, self._limits)
        try:
            return isolation.make(item), {item.stream: isolation.known_bad}
        except Exception as error:
            return picklable_error(error), {}
        finally:
            file.close()

    def add_known_bad(self, known_bad: KnownBad) -> None:
        self._builders.add_known_bad(known_bad)

    def check_stalls(self) -> tuple[list[str], Stall | None]:
        """The new warnings, and the stall if there is one. Called in a second thread while `make` runs."""
        stall = self._watch.check(activity.read_status(self._status))
        warnings, self._warnings[:] = list(self._warnings), []
        return warnings, stall

    def location(self) -> tuple[str, int]:
        """(node id, process id) of this actor."""
        import ray

        return ray.get_runtime_context().get_node_id(), os.getpid()


@dataclass
class _Request:
    """A submitted item: the number of its actor, the Ray reference of its result, and the failures so far."""

    item: WorkItem
    actor: int
    reference: Any
    deaths: int = 0
    stalls: int = 0
    is_isolated: bool = False


class RayPool:
    """Items go to the actors round-robin. A dead actor (or node) is replaced and its items are built again.

    There is no prefetcher: an actor downloads a range into its node's cache when it first needs it.
    """

    ahead = 2

    def __init__(
        self, setups: Sequence[BuilderSetup], actors: int, first_node: int, limits: StallLimits | None = None
    ) -> None:
        """`first_node`: index of the first actor's node, modulo the number of nodes; ranks use different ones."""
        self._ray = _connect()
        self._limits = limits or StallLimits()
        self._known_bad: dict[str, dict[Sample, str]] = {}
        self._setups = self._ray.put(list(setups))
        self._next_node = first_node
        self._actors = [self._start_actor() for _ in range(max(1, actors))]
        self._requests: dict[int, _Request] = {}
        self._next_ticket = 0

    def submit(self, item: WorkItem, slices: int = 1) -> int:
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        actor = ticket % len(self._actors)
        self._requests[ticket] = _Request(item, actor, self._actors[actor].make.remote(item))
        return ticket

    def result(self, ticket: int) -> Batch:
        request = self._requests[ticket]
        while True:
            try:
                stall = self._wait(request)
                if stall is None:
                    result = self._ray.get(request.reference)
                    break
                request.stalls += 1
                if request.stalls >= MAX_SLICE_STALLS:
                    raise stall_error(request.item, stall)
            except self._ray.exceptions.RayTaskError:
                raise
            except self._ray.exceptions.RayError as error:
                request.deaths += 1
                if request.deaths >= MAX_SLICE_DEATHS + MAX_ROW_DEATHS:
                    raise WorkerError(
                        f"{describe_rows(request.item)}: {request.deaths} Ray actors, one after the other, failed to "
                        f"build it. No sample was replaced. The last error: {error}"
                    ) from error
                request.is_isolated = request.deaths >= MAX_SLICE_DEATHS
            self._replace_actor(request.actor)
        del self._requests[ticket]
        if request.is_isolated:
            result, known_bad = result
            self._share_known_bad(known_bad)
        if isinstance(result, Exception):
            raise result
        return _writable(result)

    def _wait(self, request: _Request) -> Stall | None:
        """Wait until an item is built or its actor is dead, and log warnings. Returns the actor's stall, if any."""
        while not self._ray.wait([request.reference], timeout=min(POLL_SECONDS, self._limits.warn))[0]:
            method = self._actors[request.actor].check_stalls.options(concurrency_group="watch")
            check = method.remote()
            if self._ray.wait([check], timeout=POLL_SECONDS)[0]:
                warnings, stall = self._ray.get(check)
                for line in warnings:
                    log.warning(line)
                if isinstance(stall, Stall):
                    return stall
        return None

    def _share_known_bad(self, known_bad: KnownBad) -> None:
        """Send bad samples to all actors, also to those that start later."""
        for stream, samples in known_bad.items():
            self._known_bad.setdefault(stream, {}).update(samples)
        if any(known_bad.values()):
            for actor in self._actors:
                actor.add_known_bad.remote(known_bad)

    def cancel(self) -> None:
        for request in self._requests.values():
            with suppress(self._ray.exceptions.RayError):
                self._ray.cancel(request.reference)
        self._requests.clear()

    def close(self) -> None:
        self.cancel()
        for actor in self._actors:
            with suppress(self._ray.exceptions.RayError):
                self._ray.kill(actor)
        self._actors.clear()

    def locations(self) -> list[tuple[str, int]]:
        """(node id, process id) of every actor."""
        locations: list[tuple[str, int]] = self._ray.get([actor.location.remote() for actor in self._actors])
        return locations

    def _start_actor(self) -> Any:
        # The actor reserves no CPU, because the ranks may have reserved all of them. Ray's SPREAD strategy, and
        # sometimes a soft node affinity, put such actors on one node. So each actor gets a hard affinity to the next
        # node. If that node is gone, the actor dies before it starts, and its replacement goes to the node after it.
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        alive = [node for node in self._ray.nodes() if node["Alive"]]
        nodes = sorted(node["NodeID"] for node in alive if node["Resources"].get("CPU")) or [
            alive[0]["NodeID"]
        ]
        strategy = NodeAffinitySchedulingStrategy(nodes[self._next_node % len(nodes)], soft=False)
        self._next_node += 1
        actor_class = self._ray.remote(
            num_cpus=0, max_restarts=0, scheduling_strategy=strategy, concurrency_groups={"watch": 1}
        )(BatchActor)
        return actor_class.remote(self._setups, os.getcwd(), self._limits, self._known_bad)

    def _replace_actor(self, number: int) -> None:
        """Start a new actor for a dead or stalled one, and submit again the items whose results are not fetched yet."""
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._actors[number])
        actor = self._actors[number] = self._start_actor()
        for request in self._requests.values():
            if request.actor == number:
                method = actor.make_isolated if request.is_isolated else actor.make
                request.reference = method.remote(request.item)


def _connect() -> Any:
    """The ray module, connected to this process's cluster, else to RAY_ADDRESS, else to a cluster on this machine."""
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
            # ray.init's handler ends the process on SIGTERM; a rank must save a checkpoint first.
            signal.signal(signal.SIGTERM, on_sigterm)
    return ray


def _writable(batch: Batch) -> Batch:
    """Copy the batch's arrays: those from Ray are read-only views of its object store, and keep it full."""
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, np.ndarray):
            setattr(batch, field.name, value.copy())
    batch.fields = {name: array.copy() for name, array in batch.fields.items()}
    return batch
