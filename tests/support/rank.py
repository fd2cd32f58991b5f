"""Starts a training rank, forked from a server that has imported torch and deepspeed, which saves seconds per start."""

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

# Always on the CPU: a server that has initialised CUDA cannot be forked.
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


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
    """A process that trains the stage `main` as the only rank, and the file with its output."""

    process: ForkServerProcess
    log: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Poll until `condition` holds; fails if the process ends or after 100 seconds."""
        deadline = time.monotonic() + 100
        while not condition():
            assert self.process.is_alive(), self.log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def code(self) -> int:
        """Wait for the process to end and return its exit code; kills it after 120 seconds."""
        self.process.join(timeout=120)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running:\n{self.log.read_text()[-3000:]}")
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
    """Train until the rank ends; return its exit code and its output."""
    rank = start(recipe, *overrides)
    return rank.code(), rank.log.read_text()
