"""Stands in for the parts of Ray's API that the driver of a job uses: actors are objects of this process.

Every node has an address of its own on this machine (127.0.0.1, 127.0.0.2, ...) and gives its GPUs to the actors that
ask for them, one after the other. What real Ray does with the same calls is in tests/integration/test_ray.py.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest


class RayError(Exception):
    """As ray.exceptions.RayError: a call to an actor failed."""


class Strategy:
    def __init__(self, placement_group: Any, placement_group_bundle_index: int) -> None:
        assert 0 <= placement_group_bundle_index < len(placement_group.bundles)
        self.bundle = placement_group_bundle_index


class FakeRay:
    """free_after: number of times that a placement group is waited for before its nodes are free.

    worker_env: variables of the actors' processes: those of the job, and Ray's own.
    """

    def __init__(self, nodes: int, gpus: int = 0, free_after: int = 0) -> None:
        self.groups: list[Any] = []
        self.actors: list[Actor] = []
        self.inits: list[dict[str, Any]] = []
        self.free_after = free_after
        self.worker_env: dict[str, str] = {}
        # Ray's GPU numbers need not begin at 0, nor be in order.
        self.gpus = [[str(10 * node + 7 - number) for number in range(gpus)] for node in range(nodes)]
        self.current: Actor | None = None
        self.node_count = nodes

    def install(self, patch: pytest.MonkeyPatch) -> FakeRay:
        """Make this the package `ray` until the test ends."""
        package = ModuleType("ray")
        modules = {
            "ray": package,
            "ray.exceptions": SimpleNamespace(RayError=RayError),
            "ray.util": SimpleNamespace(get_node_ip_address=lambda: self._here().address),
            "ray.util.placement_group": SimpleNamespace(placement_group=self.placement_group),
            "ray.util.scheduling_strategies": SimpleNamespace(PlacementGroupSchedulingStrategy=Strategy),
        }
        for name in ("init", "get", "remote", "nodes", "get_gpu_ids", "get_runtime_context"):
            setattr(package, name, getattr(self, name))
        package.exceptions, package.util = modules["ray.exceptions"], modules["ray.util"]  # type: ignore[attr-defined]
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
        return self

    def init(self, **options: Any) -> None:
        self.inits.append(options)
        for number in (signal.SIGTERM, signal.SIGINT):  # as ray.init does
            signal.signal(number, signal.SIG_IGN)

    def placement_group(self, bundles: Sequence[dict[str, float]], strategy: str) -> Any:
        group = SimpleNamespace(bundles=list(bundles), strategy=strategy, waits=0)

        def wait(seconds: float) -> bool:
            group.waits += 1
            return group.waits > self.free_after

        group.wait = wait
        self.groups.append(group)
        return group

    def remote(self, kind: type) -> Any:
        def options(scheduling_strategy: Strategy, **asked: Any) -> Any:
            return SimpleNamespace(remote=lambda: Actor(self, kind(), scheduling_strategy.bundle, asked))

        return SimpleNamespace(options=options)

    def get(self, references: Any, timeout: float | None = None) -> Any:
        if isinstance(references, list):
            return [self.get(reference) for reference in references]
        if isinstance(references, RayError):
            raise references
        return references[0]

    def nodes(self) -> list[dict[str, Any]]:
        here = [{"CPU": 4.0, "GPU": float(len(gpus)), "memory": 1e9} for gpus in self.gpus]
        return [{"Alive": True, "Resources": node} for node in here] + [{"Alive": False, "Resources": {}}]

    def get_gpu_ids(self) -> list[str]:
        return self._here().gpus

    def get_runtime_context(self) -> Any:
        node = f"node {self.current.bundle}" if self.current else "the driver's"
        return SimpleNamespace(gcs_address="127.0.0.1:6379", get_node_id=lambda: node)

    def _here(self) -> Actor:
        assert self.current is not None, "called outside an actor"
        return self.current


class Actor:
    """An actor's handle; `lost` makes its later calls fail, as when its node is gone."""

    def __init__(self, ray: FakeRay, inner: Any, bundle: int, asked: dict[str, Any]) -> None:
        self.ray, self.inner, self.bundle, self.asked = ray, inner, bundle, asked
        self.address = f"127.0.0.{bundle + 1}"
        free = ray.gpus[bundle]
        self.gpus = [free.pop(0) for _ in range(int(asked.get("num_gpus", 0)))]
        self.lost = False
        ray.actors.append(self)

    def __getattr__(self, method: str) -> Any:
        def call(*arguments: Any) -> Any:
            if self.lost:
                return RayError(f"{method}: the actor is dead")
            # All addresses belong to this machine, but a node of a cluster can bind only its own.
            assert method != "port" or arguments == (self.address,)
            self.ray.current = self
            try:
                with mock.patch.dict(os.environ, self.ray.worker_env):
                    return (getattr(self.inner, method)(*arguments),)
            finally:
                self.ray.current = None

        return SimpleNamespace(remote=call)
