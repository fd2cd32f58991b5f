"""Starts training ranks, forked from a server that has imported torch and deepspeed (tests/support/forks.py)."""

from __future__ import annotations

from pathlib import Path

from tests.support.forks import Fork, fork, free_port, rank_environment


def start_ranks(
    recipe: Path, *overrides: str, world: int = 1, stage: str = "main", logs: Path | None = None
) -> list[Fork]:
    """Start the ranks of a training stage; their output goes to files in `logs`, by default the recipe's folder."""
    port = free_port()
    return [
        fork(
            "pretrain.train.main",
            "main",
            (str(recipe), stage, overrides),
            rank_environment(rank, world, port),
            (logs or recipe.parent) / f"{recipe.stem}.{stage}.{rank}.log",
        )
        for rank in range(world)
    ]


def start(recipe: Path, *overrides: str, stage: str = "main", logs: Path | None = None) -> Fork:
    """Start a training of `recipe` as the only rank."""
    return start_ranks(recipe, *overrides, stage=stage, logs=logs)[0]


def run(recipe: Path, *overrides: str, stage: str = "main", logs: Path | None = None) -> tuple[int, str]:
    """Train until the only rank ends; return its exit code and its output."""
    rank = start(recipe, *overrides, stage=stage, logs=logs)
    code = rank.code()
    return code, rank.log.read_text()
