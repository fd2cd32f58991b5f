"""Layers and heads combined by mergekit's slices, and tensors that cannot be mixed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UserError
from pretrain.merge import open_weights
from pretrain.merge.execute import execute
from pretrain.merge.mergekit.plan import open_mergekit, plan_mergekit
from pretrain.merge.mergekit.yaml_file import parse
from tests.support.merge_inputs import floats, write


def stacked(folder: Path, layers: int, counter: list[int], dtype: str = "int64") -> Path:
    """Layers with an integer buffer (`counter`) or 8-bit floats each."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {}
    for layer in range(layers):
        tensors[f"model.layers.{layer}.w.weight"] = torch.full((2, 2), float(layer))
        tensors[f"model.layers.{layer}.steps"] = torch.tensor([counter[layer]]).to(getattr(torch, dtype))
    save_file(tensors, folder / "model.safetensors")
    return folder


def headed(folder: Path, seed: int, tied: bool) -> str:
    """One layer between embeddings and a head; a tied head is not stored."""
    names = ["model.embed_tokens.weight", "model.layers.0.w.weight", *([] if tied else ["lm_head.weight"])]
    write(folder, {name: floats(10 * seed + place, 4, 3) for place, name in enumerate(names)})
    config = {"tie_word_embeddings": tied, "num_hidden_layers": 1, "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_head_that_one_model_ties_is_its_embedding(tmp_path: Path) -> None:
    """The model of the output's config stores its head: mixed as in mergekit, which stacks without a head."""
    a, b = headed(tmp_path / "a", 1, False), headed(tmp_path / "b", 2, True)
    slices = [{"sources": [{"model": model, "layer_range": [0, 1]}]} for model in (a, b)]
    stack = {"merge_method": "passthrough", "slices": slices}
    models = [{"model": model, "parameters": {"weight": 0.5}} for model in (a, b)]
    mix = {"merge_method": "linear", "models": models}
    for name, values in (("stack", stack), ("mix", mix)):
        made = plan_mergekit(file := parse("x.yml", values), opened := open_mergekit(file), 10**9)
        execute([made], opened, [tmp_path / name])
    mine, theirs = open_weights(a).array("lm_head.weight"), open_weights(b).array("model.embed_tokens.weight")
    got = {name: open_weights(str(tmp_path / name)).array("lm_head.weight") for name in ("stack", "mix")}
    assert np.array_equal(got["stack"], theirs)
    assert np.array_equal(got["mix"], ((mine.astype(np.float64) + theirs) / 2).astype(np.float32))
    file = parse("x.yml", stack | {"base_model": b, "slices": slices[::-1]})
    made = plan_mergekit(file, open_mergekit(file), 10**9)
    assert any("the output has lm_head.weight, but its config (from " in note for note in made.notes)
    file = parse("x.yml", mix | {"base_model": b})
    with pytest.raises(
        UserError, match=r"lm_head.weight is missing in A .* \(tied to model.embed_tokens.weight there"
    ):
        plan_mergekit(file, open_mergekit(file), 10**9)


@pytest.mark.parametrize(("counters", "fits"), [([7, 5, 6], True), ([5, 6, 7], False)])
def test_integers_are_compared_between_the_layers_that_meet(
    tmp_path: Path, counters: list[int], fits: bool
) -> None:
    a, b = stacked(tmp_path / "a", 2, [5, 6]), stacked(tmp_path / "b", 3, counters)
    sources = [{"model": str(a), "layer_range": [0, 2]}, {"model": str(b), "layer_range": [1, 3]}]
    values = {"merge_method": "linear", "slices": [{"sources": sources}], "parameters": {"weight": 0.5}}
    file = parse("x.yml", values)
    if not fits:
        with pytest.raises(
            UserError, match=r"layers\.\*\.steps: I64, and differs between the inputs \(2 tensors\)"
        ):
            plan_mergekit(file, open_mergekit(file), 10**9)
        return
    made = plan_mergekit(file, opened := open_mergekit(file), 10**9)
    execute([made], opened, [tmp_path / "out"])
    got = open_weights(str(tmp_path / "out"))
    assert [int(got.array(f"model.layers.{layer}.steps")[0]) for layer in range(2)] == [5, 6]
    assert got.array("model.layers.1.w.weight").tolist() == [[1.5, 1.5], [1.5, 1.5]]


def test_8_bit_floats_are_stacked_and_not_mixed(tmp_path: Path) -> None:
    models = [stacked(tmp_path / name, 2, [1, 2], "float8_e4m3fn") for name in "ab"]
    slices = [{"sources": [{"model": str(model), "layer_range": [0, 2]}]} for model in models]
    file = parse("x.yml", {"merge_method": "passthrough", "slices": slices})
    execute([plan_mergekit(file, opened := open_mergekit(file), 10**9)], opened, [tmp_path / "out"])
    assert open_weights(str(tmp_path / "out")).info("model.layers.3.steps") == ("F8_E4M3", (1,))
    inputs = [{"model": str(model), "parameters": {"weight": 1}} for model in models]
    file = parse("x.yml", {"merge_method": "linear", "models": inputs})
    with pytest.raises(
        UserError, match="dtype F8_E4M3: 8-bit floats cannot be mixed; name the weights in 16 bits"
    ):
        plan_mergekit(file, open_mergekit(file), 10**9)
