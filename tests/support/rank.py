"""A rank in a process of its own, forked from a server that has imported torch and deepspeed: seconds each, not ten."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
"""On the CPU, always: a server that has touched CUDA cannot be forked."""


def _train(recipe: str, overrides: tuple[str, ...], log: str, port: int) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= ENVIRONMENT | {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    from pretrain.train.main import main

    sys.exit(main(recipe, "main", overrides))


@dataclass(frozen=True)
class Rank:
    """A training of the stage `main` by one rank, and what it prints."""

    process: ForkServerProcess
    log: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait_for(self, seen: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 100
        while not seen():
            assert self.process.is_alive(), self.log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def code(self) -> int:
        """Its exit code, once it has ended."""
        self.process.join(timeout=120)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still runs:\n{self.log.read_text()[-3000:]}")
        return self.process.exitcode


def start(recipe: Path, *overrides: str) -> Rank:
    """Start a training of `recipe`; its output goes to a file beside it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["deepspeed", "pretrain.train.session", "transformers.models.llama.modeling_llama"]
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = recipe.with_suffix(".log")
    before = {key: os.environ.get(key) for key in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)  # the server inherits them when the first rank starts it
    try:
        process = context.Process(target=_train, args=(str(recipe), overrides, str(log), port), daemon=True)
        process.start()
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
    return Rank(process, log)


def run(recipe: Path, *overrides: str) -> tuple[int, str]:
    """Train to the rank's end: its exit code and what it printed."""
    rank = start(recipe, *overrides)
    return rank.code(), rank.log.read_text()
