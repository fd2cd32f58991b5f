"""Checkpoints of which each rank holds a part: LLaMA2-Accessory's and torch.distributed.checkpoint's."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import UserError
from pretrain.merge import merge
from pretrain.merge.verify.check_output import verify
from pretrain.weights.formats.chunked_tensor import ChunkedTensor, Part
from pretrain.weights.source import open_weights

torch = pytest.importorskip("torch")

SPLIT = {
    "llma.tok_embeddings.weight": 1,
    "llma.layers.0.attention.wq.weight": 0,
    "llma.layers.0.attention.wq.bias": 0,
    "llma.layers.0.attention.wo.weight": 1,
    "llma.layers.0.attention.wo.bias": None,
    "llma.layers.0.feed_forward.w1.weight": 0,
    "llma.layers.0.feed_forward.w2.weight": 1,
    "llma.layers.0.feed_forward.w3.weight": 0,
    "llma.layers.0.attention_norm.weight": None,
    "llma.clip.visual.proj": None,
    "llma.output.weight": 0,
}


def accessory(folder: Path, seed: int, size: int) -> dict[str, Any]:
    """Write a model split over `size` ranks by torch, as the trainer does; returns the whole tensors."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    shapes = {name: (8,) if name.endswith(("bias", "norm.weight")) else (8, 12) for name in SPLIT}
    whole = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    for rank in range(size):
        held = {
            name: tensor.clone() if SPLIT[name] is None else tensor.chunk(size, SPLIT[name])[rank].clone()
            for name, tensor in whole.items()
        }
        if rank == size - 1:
            held["llma.layers.0.feed_forward.experts.3.x"] = torch.ones(3).bfloat16()
        torch.save({"model": held}, folder / f"consolidated.{rank:02d}-of-{size:02d}.model.pth")
        torch.save({"optimizer": {}}, folder / f"consolidated.{rank:02d}-of-{size:02d}.optimizer.pth")
    (folder / "tokenizer.model").write_bytes(b"spm")
    return whole | {"llma.layers.0.feed_forward.experts.3.x": torch.ones(3).bfloat16()}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_parts_of_tensor_parallel_ranks_are_joined(tmp_path: Path, size: int) -> None:
    a, b = accessory(tmp_path / "a", 0, size), accessory(tmp_path / "b", 1, 3 - min(size, 2))
    merge([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out", beta=0.25)
    source = open_weights(str(tmp_path / "out"))
    assert sorted(source.names()) == sorted(a)
    for name, tensor in a.items():
        expected = (tensor.float() * 0.25 + b[name].float() * 0.75).bfloat16().float()
        np.testing.assert_array_equal(source.array(name), expected.numpy(), err_msg=name)
    assert (tmp_path / "out/tokenizer.model").is_file()
    assert not verify(tmp_path / "out", full=True).wrong


def test_a_rank_that_is_missing_or_does_not_fit(tmp_path: Path) -> None:
    accessory(tmp_path / "a", 0, 4)
    (tmp_path / "a/consolidated.02-of-04.model.pth").unlink()
    with pytest.raises(UserError, match=r"consolidated\.02-of-04\.model\.pth is missing"):
        open_weights(str(tmp_path / "a"))
    accessory(tmp_path / "b", 0, 2)
    path = tmp_path / "b/consolidated.01-of-02.model.pth"
    held = torch.load(path)["model"]
    torch.save({"model": held | {"llma.clip.visual.proj": torch.randn(8, 12).bfloat16()}}, path)
    with pytest.raises(UserError, match=r"llma\.clip\.visual\.proj differs between the ranks"):
        open_weights(str(tmp_path / "b"))


def test_chunks_in_every_direction_read_as_the_whole() -> None:
    whole = np.arange(5 * 6 * 4, dtype=np.float32).reshape(5, 6, 4)
    parts = []
    for rows in (slice(0, 2), slice(2, 5)):
        for columns in (slice(0, 1), slice(1, 6)):
            flat = np.ascontiguousarray(whole[rows, columns]).reshape(-1)
            sizes = (rows.stop - rows.start, columns.stop - columns.start, 4)
            parts.append(Part((rows.start, columns.start, 0), sizes, lambda i, j, flat=flat: flat[i:j]))
    tensor = ChunkedTensor("F32", whole.shape, tuple(parts))
    for start in range(0, 120, 7):
        for stop in range(start, 121, 5):
            np.testing.assert_array_equal(tensor.read(start, stop), whole.reshape(-1)[start:stop])
    with pytest.raises(ValueError, match="do not cover"):
        ChunkedTensor("F32", whole.shape, tuple(parts[:-1]))


def dcp(folder: Path, state: dict[str, Any]) -> Path:
    from torch.distributed.checkpoint import FileSystemWriter, save

    save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
    return folder


def model(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {
        "a.weight": torch.randn(6, 4), "b": torch.randn(3).bfloat16(), "scale": torch.tensor(2.0 + seed),
        "count": torch.tensor([seed, 7]), "t": torch.randn(4, 6).t(),
    }  # fmt: skip


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s, seed: s,
        lambda s, seed: {
            "model": s,
            "optimizer": {"state": {"a.weight": {"exp_avg": torch.ones(6, 4)}}, "lr": 0.1},
        },
        lambda s, seed: {"state_dict": s, "step": seed},
        lambda s, seed: {"app": {"model": s}},
    ],
    ids=["flat", "with_optimizer", "with_step", "nested"],
)
def test_a_folder_of_torch_distributed_checkpoint(tmp_path: Path, wrap: Any) -> None:
    inputs = [str(dcp(tmp_path / name, wrap(model(seed), seed))) for seed, name in enumerate("ab")]
    key = "app.model" if "app" in wrap(model(0), 0) else None
    merge(inputs, tmp_path / "out", beta=0.5, key=key)
    merged = open_weights(str(tmp_path / "out"))
    a, b = model(0), model(1)
    assert sorted(merged.names()) == sorted(a)
    for name in ("a.weight", "scale", "t"):
        mean = ((a[name].double() + b[name].double()) / 2).float()
        np.testing.assert_array_equal(merged.array(name), mean.numpy(), err_msg=name)
    assert merged.array("count").tolist() == [0, 7]
    assert not verify(tmp_path / "out", full=True).wrong


def test_two_models_in_one_folder_need_a_key(tmp_path: Path) -> None:
    folder = dcp(tmp_path / "a", {"model": model(0), "ema": model(1)})
    with pytest.raises(UserError, match="--key"):
        open_weights(str(folder))
    assert open_weights(str(folder), key="ema").array("scale").item() == 3.0


def test_shards_of_several_ranks(tmp_path: Path) -> None:
    """Metadata as of two ranks: the rows of one tensor in two files."""
    folder = dcp(
        tmp_path / "a", {"w1": torch.arange(6.0).reshape(3, 2), "w2": torch.arange(6.0, 10.0).reshape(2, 2)}
    )
    meta = pickle.loads(
        (folder / ".metadata").read_bytes()
    )  # torch wrote it in this test; it is changed below
    shutil.copy(folder / "__0_0.distcp", folder / "__1_0.distcp")
    index = {i.fqn: i for i in meta.storage_data}
    infos = {name: meta.storage_data[i] for name, i in index.items()}
    parts = meta.state_dict_metadata
    second = type(index["w1"])("w1", torch.Size([3, 0]))
    chunk = parts["w2"].chunks[0]
    chunk.offsets = torch.Size([3, 0])
    parts["w1"].chunks.append(chunk)
    parts["w1"].size = torch.Size([5, 2])
    del parts["w2"]
    infos["w2"].relative_path = "__1_0.distcp"
    meta.storage_data = {index["w1"]: infos["w1"], second: infos["w2"]}
    (folder / ".metadata").write_bytes(pickle.dumps(meta))
    assert open_weights(str(folder)).array("w1").tolist() == np.arange(10.0).reshape(5, 2).tolist()
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(UserError, match=r"__1_0\.distcp is missing"):
        open_weights(str(folder))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("evil-dcp"),)


def test_metadata_with_code_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = dcp(tmp_path / "a", {"w": torch.ones(2)})
    for content in (Evil(), {"x": Evil()}, "text", [1]):
        (folder / ".metadata").write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=r"not the metadata of torch\.distributed\.checkpoint"):
            open_weights(str(folder))
    assert not (tmp_path / "evil-dcp").exists()


def test_distcp_files_without_their_metadata(tmp_path: Path) -> None:
    folder = dcp(tmp_path / "a", {"w": torch.ones(2)})
    (folder / ".metadata").unlink()
    with pytest.raises(UserError, match=r"without its file \.metadata"):
        open_weights(str(folder))
