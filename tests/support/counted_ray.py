"""Stands in for the module ray: actors are objects of this process, calls run at once and are counted.

A test makes an actor die with `Actor.dead`; what was asked of it then fails, as with Ray.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class RayError(Exception): ...


class RayTaskError(RayError): ...


class Reference:
    """The result of one call; computed when it is asked for."""

    def __init__(self, actor: Actor, compute: Callable[[], Any]) -> None:
        self.actor, self._compute = actor, compute

    def result(self) -> Any:
        if self.actor.dead:
            raise RayError("the actor died")
        return self._compute()


class Actor:
    """A handle. `calls` has (method, arguments) of every call that was made, also after its death."""

    def __init__(self, made: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.made, self.arguments, self.options = made, arguments, options
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.dead = False

    def of(self, method: str) -> list[tuple[Any, ...]]:
        """Arguments of the calls of one method."""
        return [arguments for name, arguments in self.calls if name == method]

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)

        def remote(*arguments: Any) -> Reference:
            self.calls.append((method, arguments))
            return Reference(self, lambda: getattr(self.made, method)(*arguments))

        return SimpleNamespace(remote=remote, options=lambda **_: SimpleNamespace(remote=remote))


class Ray:
    """The functions of ray. `actor_class`: what every actor really is, instead of the class that was asked for."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, actor_class: Callable[..., Any], nodes: Sequence[str]) -> None:
        self._class = actor_class
        self._nodes = [{"NodeID": name, "Alive": True, "Resources": {"CPU": 4.0}} for name in nodes]
        self.actors: list[Actor] = []
        self.cancelled: list[Reference] = []
        self.killed: list[Actor] = []

    def remote(self, *classes: Any, **options: Any) -> Any:
        def start(*arguments: Any, **more: Any) -> Actor:
            self.actors.append(Actor(self._class(*arguments), arguments, options | more))
            return self.actors[-1]

        def with_options(**more: Any) -> Any:
            return SimpleNamespace(remote=lambda *arguments: start(*arguments, **more))

        handle = SimpleNamespace(remote=start, options=with_options)
        return handle if classes else lambda _: handle

    def is_initialized(self) -> bool:
        return True

    def put(self, value: Any) -> Any:
        return value

    def nodes(self) -> list[dict[str, Any]]:
        return self._nodes

    def get(self, references: Any, timeout: float | None = None) -> Any:
        if isinstance(references, Reference):
            return references.result()
        return [each.result() for each in references]

    def wait(self, references: list[Reference], timeout: float | None = None) -> tuple[list[Any], list[Any]]:
        return references, []

    def cancel(self, reference: Reference) -> None:
        self.cancelled.append(reference)

    def kill(self, actor: Actor) -> None:
        actor.dead = True
        self.killed.append(actor)

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(gcs_address="head:6379")


def install(
    monkeypatch: pytest.MonkeyPatch, actor_class: Callable[..., Any], nodes: Sequence[str] = ("n0", "n1")
) -> Ray:
    """Make `import ray` give a new Ray."""
    ray = Ray(actor_class, nodes)
    strategies, placement = ModuleType("strategies"), ModuleType("placement")
    for name in ("NodeAffinitySchedulingStrategy", "PlacementGroupSchedulingStrategy"):
        setattr(strategies, name, lambda *given, **named: SimpleNamespace(given=given, **named))
    group = SimpleNamespace(wait=lambda seconds: True)
    setattr(placement, "placement_group", lambda bundles, strategy: group)  # noqa: B010  (a module)
    modules: dict[str, Any] = {
        "ray": ray,
        "ray.util": ModuleType("util"),
        "ray.util.scheduling_strategies": strategies,
        "ray.util.placement_group": placement,
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return ray
