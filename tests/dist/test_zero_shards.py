"""ZeRO checkpoints as we read them against DeepSpeed's own reading, bit for bit; merges across stages and ranks."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from data_pipeline.errors import UserError
from pretrain.merge import merge, open_weights
from pretrain.weights.dtypes import elements
from pretrain.weights.formats.zero_shards import ZeroShards
from tests.support.forks import fork, free_port, rank_environment, wait_all

pytestmark = pytest.mark.dist

NAMES = [f"zero{stage}_{dtype}" for stage in range(4) for dtype in ("fp32", "bf16")]
NAMES += [f"zero{stage}_fp32_all" for stage in (1, 2, 3)] + ["zero3_bf16_all"]
WRITER = "tests.dist.zero_writer"
ACCUMULATED = "zero1_bf16_accumulated"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """w1/NAME and w2/NAME: checkpoints of one and of two ranks, each with its reference."""
    root = tmp_path_factory.mktemp("zero")
    for world in (1, 2):
        port = free_port()
        arguments = (str(root / f"w{world}"), world, [*NAMES, ACCUMULATED])
        ranks = [
            fork(
                WRITER, "main", arguments, rank_environment(rank, world, port), root / f"w{world}.{rank}.log"
            )
            for rank in range(world)
        ]
        wait_all(ranks)
    return root


def read_all(folder: Path) -> tuple[dict[str, np.ndarray], ZeroShards]:
    """Every tensor, tied names included; bf16 widened."""
    shards = ZeroShards(folder)
    found = {}
    for name in shards.names():
        dtype, shape = shards.info(name)
        flat = shards.read(name, 0, elements(shape))
        found[name] = ((flat.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else flat).reshape(
            shape
        )
    return found | {alias: found[name] for alias, name in shards.tied.items()}, shards


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_deepspeed_s_bit_for_bit(written: Path, name: str, world: int) -> None:
    folder = written / f"w{world}" / name
    expected = dict(np.load(folder / "reference.npz"))
    got, shards = read_all(folder / "step")
    assert set(got) == set(expected)
    for key, value in expected.items():
        assert got[key].shape == value.shape, key
        assert got[key].tobytes() == value.tobytes(), key
    assert shards.tied == {"head.weight": "embed.weight"}
    frozen = {"frozen.weight", "frozen.bias"} if name.endswith("_all") else set()
    assert shards.frozen == frozen
    assert shards.info("body.weight") == ("F32", (3, 5))


@pytest.mark.parametrize("world", [1, 2])
def test_masters_behind_gradients_in_fp32(written: Path, world: int) -> None:
    """Files bf16_zero_pp_*: their fp32 masters round to the module's weights and differ from them."""
    folder = written / f"w{world}" / ACCUMULATED
    assert list((folder / "step").glob("bf16_zero_pp_rank_*"))
    expected = dict(np.load(folder / "reference.npz"))
    got, shards = read_all(folder / "step")
    assert set(got) == set(expected)
    for key, value in expected.items():
        wide = got[key]
        if key not in ("count", "running"):
            wide = torch.from_numpy(wide.copy()).bfloat16().float().numpy()
        assert wide.tobytes() == value.tobytes(), key
    assert got["up.weight"].tobytes() != expected["up.weight"].tobytes()
    assert shards.info("up.weight") == ("F32", (5, 11))


@pytest.mark.parametrize("name", ["zero2_fp32", "zero3_fp32", ACCUMULATED])
def test_universal_checkpoints_are_the_shards(written: Path, tmp_path: Path, name: str) -> None:
    shards = open_weights(str(written / "w2" / name / "step"))
    arguments = str(written / "w2" / name / "step"), str(tmp_path / "out")
    converter = fork(WRITER, "convert", arguments, {}, tmp_path / "log")
    assert converter.code() == 0, converter.log.read_text()[-3000:]
    universal = open_weights(str(tmp_path / "out"))
    assert universal.tied == shards.tied == {"head.weight": "embed.weight"}
    assert set(shards.names()) <= set(universal.names())
    for key in shards.names():
        assert universal.info(key) == shards.info(key), key
        assert universal.array(key).tobytes() == shards.array(key).tobytes(), key


@pytest.mark.parametrize("name", ["zero2_fp32", "zero3_fp32"])
def test_any_range_of_a_tensor_over_ranks(written: Path, name: str) -> None:
    folder = written / "w2" / name
    expected = np.load(folder / "reference.npz")
    shards = ZeroShards(folder / "step")
    for key in ("embed.weight", "up.weight", "scale"):
        flat = expected[key].ravel()
        for start_at in range(flat.size + 1):
            for stop in range(start_at, flat.size + 1, 3):
                np.testing.assert_array_equal(shards.read(key, start_at, stop), flat[start_at:stop])


def test_stage_3_of_two_ranks_with_stage_1_of_one(written: Path, tmp_path: Path) -> None:
    inputs = [str(written / "w2/zero3_bf16/step"), str(written / "w1/zero1_fp32/step")]
    merge(inputs, tmp_path / "out", beta=0.3)
    a, b = (dict(np.load(Path(p).parent / "reference.npz")) for p in inputs)
    got = load_file(tmp_path / "out/model.safetensors")
    assert set(got) == set(a) - {"head.weight"}
    for name, value in got.items():
        if value.dtype == np.int64:
            np.testing.assert_array_equal(value, a[name])
            continue
        assert not np.array_equal(a[name], b[name]), name
        wide = 0.3 * a[name].astype(np.float64) + (1 - 0.3) * b[name].astype(np.float64)
        np.testing.assert_array_equal(value, wide.astype(np.float32))


def test_endpoints_are_the_masters(written: Path, tmp_path: Path) -> None:
    inputs = [str(written / "w2/zero2_bf16/step"), str(written / "w1/zero0_fp32/step")]
    for beta, parent in ((1.0, inputs[0]), (0.0, inputs[1])):
        merge(inputs, tmp_path / str(beta), beta=beta)
        expected = np.load(Path(parent).parent / "reference.npz")
        for name, value in load_file(tmp_path / str(beta) / "model.safetensors").items():
            assert value.tobytes() == expected[name].tobytes(), name


def test_frozen_parameters_inside_the_checkpoints(written: Path, tmp_path: Path) -> None:
    inputs = [str(written / f"w{w}/zero{z}_fp32_all/step") for w, z in ((1, 2), (2, 3))]
    with pytest.raises(UserError, match=r"frozen\.weight: is frozen, but differs"):
        merge(inputs, tmp_path / "out", beta=0.5)
    merge(inputs, tmp_path / "out", beta=0.5, copy_rest="B")
    got, expected = (
        load_file(tmp_path / "out/model.safetensors"),
        np.load(Path(inputs[1]).parent / "reference.npz"),
    )
    assert got["frozen.weight"].tobytes() == expected["frozen.weight"].tobytes()
    assert got["up.weight"].tobytes() != expected["up.weight"].tobytes()


def test_no_torch_is_needed(written: Path, tmp_path: Path) -> None:
    inputs = [str(written / "w2/zero3_fp32/step"), str(written / "w2/zero1_bf16/step")]
    code = (
        "import sys; sys.modules['torch'] = sys.modules['deepspeed'] = None\n"
        "from pretrain.merge import merge\n"
        f"merge({inputs!r}, {str(tmp_path / 'out')!r}, beta=0.5)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "out/model.safetensors").exists()


def damaged(written: Path, tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(written / "w2" / name / "step", tmp_path / "step"))


@pytest.mark.parametrize(("name", "rank"), [("zero1_fp32", 0), ("zero2_fp32", 1), ("zero3_fp32", 1)])
def test_a_missing_rank_is_named(written: Path, tmp_path: Path, name: str, rank: int) -> None:
    folder = damaged(written, tmp_path, name)
    (folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").unlink()
    found = "rank 0 is missing" if rank == 0 else "2 ranks wrote this checkpoint"
    with pytest.raises(UserError, match=found):
        ZeroShards(folder)


def test_a_truncated_shard_is_named(written: Path, tmp_path: Path) -> None:
    folder = damaged(written, tmp_path, "zero2_fp32")
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(UserError, match="zero_pp_rank_1_mp_rank_00_optim_states"):
        ZeroShards(folder)
