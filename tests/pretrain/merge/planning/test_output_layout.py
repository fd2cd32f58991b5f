"""Output files of bounded size: compared with the split of Hugging Face, and loaded by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pretrain.merge import merge, open_weights
from pretrain.merge.planning.output_layout import lay_out
from tests.support.merge_inputs import floats, write


@pytest.mark.parametrize("limit", [1, 40, 100, 399, 400, 10**9])
def test_files_are_split_as_hugging_face_splits_them(limit: int) -> None:
    hub = pytest.importorskip("huggingface_hub")
    sizes = np.random.default_rng(0).integers(1, 40, 50)
    sizes[7] = 100  # larger than some limits
    tensors = {f"t{i:02d}": ("F32", (int(size),)) for i, size in enumerate(sizes)}
    made = lay_out(tensors, limit)
    theirs = hub.split_state_dict_into_shards_factory(
        {name: shape[0] for name, (_, shape) in tensors.items()},
        get_storage_size=lambda count: 4 * count,
        get_storage_id=lambda count: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    mine: dict[str, set[str]] = {}
    for name, (file, _) in made.places.items():
        mine.setdefault(made.files[file].name, set()).add(name)
    bounded = {file: names for file, names in mine.items() if len(names) > 1}
    assert all(4 * sum(tensors[n][1][0] for n in names) <= limit for names in bounded.values())
    if all(
        4 * size <= limit for size in sizes
    ):  # they give a tensor larger than a file one of its own elsewhere
        assert {file: set(names) for file, names in theirs.filename_to_tensors.items()} == mine
    assert (made.index is None) == (len(made.files) == 1)
    if made.index is not None:
        index = json.loads(made.index)
        assert index["metadata"]["total_size"] == 4 * int(sizes.sum())
        assert index["weight_map"] == {n: made.files[f].name for n, (f, _) in made.places.items()}


def test_a_merge_in_several_files_has_the_tensors_of_one(tmp_path: Path) -> None:
    inputs = [
        str(write(tmp_path / x, {f"w{i}": floats(i + k, 50) for i in range(7)})) for k, x in enumerate("ab")
    ]
    merge(inputs, tmp_path / "one", beta=0.3)
    record = merge(inputs, tmp_path / "many", beta=0.3, max_shard_size=450)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert sorted(record["output"]) == files
    whole = load_file(tmp_path / "one/model.safetensors")
    parts = {n: a for file in files for n, a in load_file(tmp_path / "many" / file).items()}
    assert parts.keys() == whole.keys()
    assert all(np.array_equal(parts[name], whole[name]) for name in whole)
    source = open_weights(str(tmp_path / "many"))
    assert set(source.names()) == set(whole)
    again = merge([str(tmp_path / "many"), inputs[0]], tmp_path / "next", beta=1.0)
    assert again["tensors"] == record["tensors"]


def test_several_files_load_in_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(transformers.LlamaForCausalLM(config))
        models[-1].save_pretrained(tmp_path / str(seed))
    merge([str(tmp_path / "0"), str(tmp_path / "1")], tmp_path / "out", beta=0.25, max_shard_size=8000)
    assert (tmp_path / "out/model.safetensors.index.json").exists()
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        for mine, a, b in zip(loaded.parameters(), *(m.parameters() for m in models), strict=True):
            assert torch.equal(mine, (0.25 * a.double() + 0.75 * b.double()).float())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
