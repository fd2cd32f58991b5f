"""Starts training ranks, forked from a server that has imported torch and deepspeed (tests/support/forks.py)."""

from __future__ import annotations

from pathlib import Path

from tests.support.forks import Fork, fork, free_port, rank_environment


def start_ranks(recipe: Path, *overrides: str, world: int = 1, stage: str = "main") -> list[Fork]:
    """Start the ranks of a training stage; the output of rank N goes to a file beside the recipe."""
    port = free_port()
    return [
        fork(
            "pretrain.train.main",
            "main",
            (str(recipe), stage, overrides),
            rank_environment(rank, world, port),
            recipe.with_suffix(f".{stage}.{rank}.log"),
        )
        for rank in range(world)
    ]


def start(recipe: Path, *overrides: str, stage: str = "main") -> Fork:
    """Start a training of `recipe` as the only rank."""
    return start_ranks(recipe, *overrides, stage=stage)[0]


def run(recipe: Path, *overrides: str, stage: str = "main") -> tuple[int, str]:
    """Train until the only rank ends; return its exit code and its output."""
    rank = start(recipe, *overrides, stage=stage)
    code = rank.code()
    return code, rank.log.read_text()
