"""A step whose loss or gradient is not finite on one rank changes no bit of weights or optimizer state, on any ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.skip_ranks import GOOD, WITH, Toy
from tests.support.reference.weights import load, read_moments, stage_3

pytestmark = pytest.mark.dist
JOBS = [(zero, dtype) for zero in (0, 1, 2, 3) for dtype in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def root(ranks: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("skipped")
    ranks("tests.dist.skip_ranks", [(*job, str(folder / "-".join(map(str, job)))) for job in JOBS], 2, folder)
    return folder


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in a file of a checkpoint, by its place."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from tensors(each, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            yield from tensors(each, f"{name}/{number}")


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.pt")):
        found |= {f"{path.name}{name}": tensor for name, tensor in tensors(load(path))}
    return found


def named(folder: Path) -> dict[str, torch.Tensor]:
    """Of a ZeRO-3 checkpoint, moments and fp32 weights without padding, whose weights DeepSpeed leaves uninitialised."""
    names = {name for name, _ in Toy().named_parameters()}
    moments = read_moments(folder, names)
    found = {f"{name} exp_avg": tensor for name, tensor in moments.first.items()}
    found |= {f"{name} exp_avg_sq": tensor for name, tensor in moments.second.items()}
    groups = load(min(folder.glob("*model_states.pt")))["param_shapes"]
    flat = [
        load(path)["optimizer_state_dict"]["fp32_flat_groups"]
        for path in sorted(folder.glob("*optim_states.pt"))
    ]
    stage_3(
        groups,
        [{n: {"weights": each} for n, each in enumerate(of_rank)} for of_rank in flat],
        "weights",
        found,
    )
    return found


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert any("exp_avg" in name for name in ours)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize(("zero", "dtype"), JOBS)
def test_a_skipped_step_changes_nothing_and_leaves_nothing_behind(root: Path, zero: int, dtype: str) -> None:
    """Nothing behind: a training with skipped steps ends as one that never had them."""
    folder = root / f"{zero}-{dtype}"
    for number, kind in enumerate(WITH):
        if kind not in GOOD and "good" in WITH[:number]:
            before, after = (checkpoint(folder / "with" / f"{number}-{when}") for when in ("before", "after"))
            assert_same_bits(before, after)
    read = named if zero == 3 else checkpoint
    assert_same_bits(read(folder / "with" / "last"), read(folder / "without" / "last"))
