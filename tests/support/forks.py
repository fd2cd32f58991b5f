"""Starts processes by forking a server that has imported torch, deepspeed and the trainer.

In a new process these imports take 10 seconds of processor time. Always on the CPU: a server that has initialised CUDA
cannot be forked.
"""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),  # the server finds its imports in whatever folder the test is
}
PRELOAD = ["tests.support.forks_preload"]
_NUMBERS = itertools.count(os.getpid())


@dataclass(frozen=True)
class Fork:
    """A forked process, and the file with its output."""

    process: ForkServerProcess
    log: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def output(self) -> str:
        """The end of what the process wrote; empty if it died before it opened the file."""
        return self.log.read_text()[-4000:] if self.log.exists() else ""

    def send_signal(self, number: int) -> None:
        """Send a signal; no effect if the process has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def send_signal_to_all(self, number: int) -> None:
        """Send a signal to the process and all its children, as Ctrl-C in a terminal or Slurm does."""
        os.killpg(self.pid, number)

    def wait_for(self, condition: Callable[[], object], poll: float = 0.01) -> None:
        """Poll until `condition` holds; fails if the process ends or after 100 seconds."""
        deadline = time.monotonic() + 100
        while not condition():
            assert self.process.is_alive(), f"the process ended:\n{self.output}"
            assert time.monotonic() < deadline, f"the condition does not hold after 100 s:\n{self.output}"
            time.sleep(poll)

    def code(self) -> int:
        """Wait for the process to end and return its exit code (-N: ended by signal N); kills it after 240 seconds."""
        self.process.join(timeout=240)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running:\n{self.output}")
        return self.process.exitcode


def fork(module: str, function: str, arguments: tuple[Any, ...], env: Mapping[str, str], log: Path) -> Fork:
    """Call a function of a module in a forked process; its output goes to `log`, its result is the exit code.

    The process has this process's folder and environment variables, ENVIRONMENT, and `env`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    variables = {**os.environ, **ENVIRONMENT, **env}
    with mock.patch.dict(os.environ, ENVIRONMENT):  # for the server, which the first process starts
        process = context.Process(
            target=_call, args=(module, function, arguments, variables, os.getcwd(), str(log)), daemon=True
        )
        process.start()
    return Fork(process, log)


def wait_all(forks: Sequence[Fork], seconds: float = 240) -> None:
    """Wait until all processes have ended with 0. If one fails, kill the others and fail with its output."""
    deadline = time.monotonic() + seconds
    try:
        while any(each.process.exitcode is None for each in forks) and time.monotonic() < deadline:
            if any(each.process.exitcode for each in forks):
                break
            time.sleep(0.02)
        for number, each in enumerate(forks):
            code = each.process.exitcode
            assert not code, f"process {number} ended with {code}:\n{each.output}"
        for number, each in enumerate(forks):
            assert each.process.exitcode == 0, (
                f"process {number} still runs after {seconds} s:\n{each.output}"
            )
    finally:
        for each in forks:
            each.process.kill()


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """The variables that the launcher sets for a rank."""
    return {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip


def free_port() -> int:
    """A free port below those that the system gives away; each test worker has a range of its own.

    A port of the system's choice was given to another worker between this look and the start of the ranks.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 12_000 + worker % 8 * 2_500 + next(_NUMBERS) % 2_500
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("0.0.0.0", port))
            return port


def _call(
    module: str, function: str, arguments: tuple[Any, ...], env: dict[str, str], folder: str, log: str
) -> None:
    os.setsid()  # a process group of its own, for `send_signal_to_all`
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(env)
    if "coverage" in sys.modules:
        from tests.mutants.coverage_plugin import enter_context

        enter_context()
    os.chdir(folder)
    result = getattr(importlib.import_module(module), function)(*arguments)
    sys.stdout.flush()
    sys.exit(result)
