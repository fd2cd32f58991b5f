"""Runs a function in several gloo ranks, forked from a server that has imported torch, and returns all results."""

from __future__ import annotations

import importlib
import os
import pickle
from pathlib import Path
from typing import Any

from tests.support.forks import fork, wait_all


def run(world: int, module: str, function: str, folder: Path) -> list[Any]:
    """Call `function(folder)` of `module` in `world` ranks of one process group; returns their results in rank order.

    `folder` is created. Results are pickled.
    """
    folder.mkdir()
    wait_all(
        [
            fork(
                __name__,
                "_rank",
                (module, function, str(folder)),
                {"RANK": str(rank), "WORLD_SIZE": str(world)},
                folder / f"rank_{rank}.log",
            )
            for rank in range(world)
        ],
        seconds=120,
    )
    # Pickles of the processes that this call has started.
    return [pickle.loads((folder / f"rank_{rank}.pickle").read_bytes()) for rank in range(world)]


def _rank(module: str, function: str, folder: str) -> int:
    from torch import distributed

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world)
    result = getattr(importlib.import_module(module), function)(Path(folder))
    Path(folder, f"rank_{rank}.pickle").write_bytes(pickle.dumps(result))
    distributed.destroy_process_group()
    return 0
