"""Starts gloo ranks, one process per rank."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(module: str, jobs: Any, world: int, folder: Path, timeout: float = 240) -> str:
    """Run `python -m module JOBS.json` as `world` ranks; return rank 0's output, or fail with that of a failed rank."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    port = str(free_port())
    processes = []
    for rank in range(world):
        env = os.environ | {
            "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", module, str(path)],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, process in enumerate(processes):
        assert process.returncode == 0, f"rank {rank}:\n{outputs[rank][-4000:]}"
    return outputs[0]


@pytest.fixture(scope="session")
def ranks() -> Callable[..., str]:
    return run_ranks


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    tiny.make_data(root)
    return root
