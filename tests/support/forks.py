"""Starts processes by forking a server that has imported torch, deepspeed and the trainer.

In a new process these imports take 10 seconds of processor time. Always on the CPU: a server that has initialised CUDA
cannot be forked.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),  # the server finds its imports in whatever folder the test is
}
PRELOAD = ["tests.support.forks_preload"]


@dataclass(frozen=True)
class Fork:
    """A forked process, and the file with its output."""

    process: ForkServerProcess
    log: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Poll until `condition` holds; fails if the process ends or after 100 seconds."""
        deadline = time.monotonic() + 100
        while not condition():
            assert self.process.is_alive(), self.log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def code(self) -> int:
        """Wait for the process to end and return its exit code (-N: ended by signal N); kills it after 240 seconds."""
        self.process.join(timeout=240)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running:\n{self.log.read_text()[-3000:]}")
        return self.process.exitcode


def fork(module: str, function: str, arguments: tuple[Any, ...], env: Mapping[str, str], log: Path) -> Fork:
    """Call a function of a module in a forked process; its output goes to `log`, its result is the exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    before = {key: os.environ.get(key) for key in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)  # the server inherits them when the first process starts it
    try:
        process = context.Process(
            target=_call, args=(module, function, arguments, dict(env), str(log)), daemon=True
        )
        process.start()
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
    return Fork(process, log)


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """The variables that the launcher sets for a rank."""
    return {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _call(module: str, function: str, arguments: tuple[Any, ...], env: dict[str, str], log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= ENVIRONMENT | env
    result = getattr(importlib.import_module(module), function)(*arguments)
    sys.stdout.flush()
    sys.exit(result)
