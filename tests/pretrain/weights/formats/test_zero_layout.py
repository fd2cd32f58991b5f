"""ZeRO layouts of any shapes and world size, written here by DeepSpeed's rules; and malformed checkpoint folders."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.errors import UserError
from pretrain.weights.formats.zero_shards import ZeroShards

torch = pytest.importorskip("torch")

Groups = list[dict[str, np.ndarray]]


def numbered(groups: list[list[tuple[int, ...]]]) -> Groups:
    """Parameters in which every element has a unique value."""
    made: Groups = []
    at = 0
    for g, shapes in enumerate(groups):
        made.append({})
        for p, shape in enumerate(shapes):
            size = math.prod(shape)
            made[-1][f"g{g}.p{p}"] = np.arange(at, at + size, dtype=np.float32).reshape(shape)
            at += size
    return made


def model_file(path: Path, groups: Groups, **more: Any) -> None:
    shapes = [{name: torch.Size(a.shape) for name, a in group.items()} for group in groups]
    module = {name: torch.zeros(0) for group in groups for name in group}
    torch.save(
        {"module": module, "buffer_names": [], "param_shapes": shapes, "shared_params": {}, **more}, path
    )


def stage_2(folder: Path, groups: Groups, world: int, gap: int = 0) -> None:
    """Concatenate each group (`gap` elements after each parameter), pad it to 2 x world and split it into equal parts;
    the last part is saved without the padding, as in DeepSpeed."""
    model_file(folder / "mp_rank_00_model_states.pt", groups)
    vectors = [
        np.concatenate([np.append(a.ravel(), [-1.0] * gap) for a in group.values()]) for group in groups
    ]
    for rank in range(world):
        parts = []
        for vector in vectors:
            part = -(-len(vector) // (2 * world)) * 2
            parts.append(torch.from_numpy(vector[rank * part : (rank + 1) * part].astype(np.float32)))
        state = {
            "zero_stage": 2,
            "partition_count": [world] * len(groups),
            "single_partition_of_fp32_groups": parts,
            "param_alignment_paddings": [[gap] * len(group) for group in groups],
        }
        torch.save(
            {"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )


def stage_3(folder: Path, groups: Groups, world: int) -> None:
    """Pad each parameter to a multiple of world and split it; a rank concatenates its parts, one vector per group."""
    for rank in range(world):
        model_file(folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", groups)
        vectors = []
        for group in groups:
            parts = []
            for array in group.values():
                part = -(-array.size // world)
                padded = np.append(array.ravel(), np.full(part * world - array.size, np.nan, np.float32))
                parts.append(padded[rank * part : (rank + 1) * part])
            vectors.append(torch.from_numpy(np.concatenate(parts).astype(np.float32)))
        state = {"zero_stage": 3, "partition_count": world, "fp32_flat_groups": vectors}
        torch.save(
            {"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )


SHAPES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4)


@given(
    groups=st.lists(SHAPES, min_size=1, max_size=3), world=st.integers(1, 12), stage=st.sampled_from([2, 3])
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shapes_and_world_size(
    tmp_path_factory: pytest.TempPathFactory, groups: list[list[tuple[int, ...]]], world: int, stage: int
) -> None:
    folder = tmp_path_factory.mktemp("zero")
    made = numbered(groups)
    (stage_2 if stage == 2 else stage_3)(folder, made, world)
    shards = ZeroShards(folder)
    for name, array in ((n, a) for group in made for n, a in group.items()):
        assert shards.info(name) == ("F32", array.shape)
        np.testing.assert_array_equal(shards.read(name, 0, array.size), array.ravel())
        middle = array.size // 2
        np.testing.assert_array_equal(shards.read(name, middle, array.size), array.ravel()[middle:])


def test_gaps_between_aligned_parameters(tmp_path: Path) -> None:
    made = numbered([[(3, 5), (7,)], [(2,)]])
    stage_2(tmp_path, made, 2, gap=3)
    shards = ZeroShards(tmp_path)
    for name, array in ((n, a) for group in made for n, a in group.items()):
        np.testing.assert_array_equal(shards.read(name, 0, array.size), array.ravel())


@pytest.mark.parametrize("write", [stage_2, stage_3])
def test_shards_of_a_smaller_or_larger_model(tmp_path: Path, write: Any) -> None:
    for side in (3, 50):
        folder = tmp_path / str(side)
        folder.mkdir()
        write(folder, numbered([[(10, 10)]]), 2)
        other = tmp_path / f"other{side}"
        other.mkdir()
        write(other, numbered([[(side, 10)]]), 2)
        for path in other.glob("*optim_states.pt"):
            path.replace(folder / path.name)
        with pytest.raises(UserError, match=r"shards are shorter|mixes files"):
            ZeroShards(folder)


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a DeepSpeed checkpoint"):
        ZeroShards(tmp_path)
    torch.save({"state_dict": {}}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match="has no `module`"):
        ZeroShards(tmp_path)
    (tmp_path / "mp_rank_01_model_states.pt").write_bytes(b"")
    with pytest.raises(UserError, match="tensor- and pipeline-parallel"):
        ZeroShards(tmp_path)


def test_optimizer_files_without_masters(tmp_path: Path) -> None:
    stage_2(tmp_path, numbered([[(4,)]]), 1)
    path = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    for content, why in (
        ({}, "no `optimizer_state_dict`"),
        ({"optimizer_state_dict": {}}, "no flat fp32 master weights"),
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=why):
            ZeroShards(tmp_path)
