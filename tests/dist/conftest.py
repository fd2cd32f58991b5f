"""Starts gloo ranks, one process per rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.forks import fork, free_port, rank_environment, wait_all


def run_ranks(module: str, jobs: Any, world: int, folder: Path) -> str:
    """Call `main(jobs)` of a module in `world` ranks; return rank 0's output, or fail with that of a failed rank."""
    port = free_port()
    forks = [
        fork(
            module, "main", (jobs,), rank_environment(rank, world, port), folder / f"ranks.{world}.{rank}.log"
        )
        for rank in range(world)
    ]
    wait_all(forks)
    return forks[0].log.read_text()


@pytest.fixture(scope="session")
def ranks() -> Callable[..., str]:
    return run_ranks
