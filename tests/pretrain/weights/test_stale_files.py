"""Files beside weights that belong to other weights, and folders whose config stands above their shards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UserError
from pretrain.merge import merge
from pretrain.weights.source import open_weights
from tests.pretrain.weights.formats.test_zero_layout import numbered, stage_2, stage_3
from tests.support.merge_inputs import floats, write

pytest.importorskip("torch")
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4}


@pytest.mark.parametrize("head", ["other", "same", "absent", "target_gone"])
def test_a_merge_json_of_other_weights(tmp_path: Path, head: str) -> None:
    """It may call a head tied that is stored with values of its own; that head is merged."""
    inputs = []
    for seed, name in enumerate("ab"):
        embedding = floats(seed, 6, 4)
        held = {"model.embed_tokens.weight": embedding, "lm_head.weight": floats(seed + 9, 6, 4)}
        if head == "same":
            held["lm_head.weight"] = embedding.copy()
        elif head == "absent":
            del held["lm_head.weight"]
        elif head == "target_gone":
            held["model.norm.weight"] = held.pop("model.embed_tokens.weight")[0]
        folder = write(tmp_path / name, held)
        (folder / "merge.json").write_text(
            json.dumps({"tied": {"lm_head.weight": "model.embed_tokens.weight"}})
        )
        inputs.append(str(folder))
    merge(inputs, tmp_path / "out", beta=0.5)
    stored = open_weights(str(tmp_path / "out"))
    assert ("lm_head.weight" in stored.names()) == (head in ("other", "target_gone"))
    if head == "other":
        mean = (floats(9, 6, 4).astype(np.float64) + floats(10, 6, 4)) / 2
        assert stored.array("lm_head.weight").tobytes() == mean.astype(np.float32).tobytes()


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.safetensors", {"weight_map": {"w": "model-00001-of-00002.safetensors"}}),
        ("model.safetensors", {"weight_map": {}}),
        ("model.safetensors", "cut off"),
        ("model.safetensors", {"weight_map": {"w": "../elsewhere.safetensors"}}),
    ],
    ids=["missing_shards", "empty", "no_json", "outside"],
)
def test_a_stale_index_beside_the_whole_model(tmp_path: Path, name: str, index: object) -> None:
    folder = write(tmp_path / "a", {"w": floats(0, 3)}, name)
    text = index if isinstance(index, str) else json.dumps(index)
    (folder / f"{name}.index.json").write_text(text)
    source = open_weights(str(folder))
    assert source.names() == ["w"]
    assert any(f"reads {name}" in note for note in source.notes)


def test_an_index_alone_is_still_checked(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "gone.safetensors"}})
    )
    with pytest.raises(UserError, match="does not exist"):
        open_weights(str(folder))


def trainer_checkpoint(folder: Path, layout: str, latest: bool = True) -> Path:
    """checkpoint-N of transformers' Trainer with DeepSpeed."""
    shards = folder / "global_step7"
    shards.mkdir(parents=True)
    groups = numbered([[(4, 4), (4,)]])
    (stage_3 if layout == "zero3" else stage_2)(shards, groups, 2)
    if latest:
        (folder / "latest").write_text("global_step7")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ x }}")
    (folder / "optimizer.pt").write_bytes(b"no torch file")
    return folder


@pytest.mark.parametrize("layout", ["zero2", "zero3"])
@pytest.mark.parametrize("named", ["checkpoint", "shards"])
def test_a_trainer_checkpoint_keeps_config_and_tokenizer(tmp_path: Path, layout: str, named: str) -> None:
    folders = [trainer_checkpoint(tmp_path / f"checkpoint-{n}", layout) for n in (100, 200)]
    inputs = [str(folder if named == "checkpoint" else folder / "global_step7") for folder in folders]
    companions = open_weights(inputs[0]).companions
    assert set(companions) == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    }
    expected = open_weights(inputs[0])
    assert sorted(expected.names()) == sorted(n for group in numbered([[(4, 4), (4,)]]) for n in group)


def test_a_trainer_checkpoint_is_merged_whole(tmp_path: Path) -> None:
    inputs = [str(trainer_checkpoint(tmp_path / f"checkpoint-{n}", "zero2")) for n in (100, 200)]
    for path in inputs:
        (Path(path) / "tokenizer.json").unlink()
    merge(inputs, tmp_path / "out", beta=0.5)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "chat_template.jinja"} <= written
    assert json.loads((tmp_path / "out/config.json").read_text()) == CONFIG


def test_a_config_above_folders_that_is_not_theirs(tmp_path: Path) -> None:
    """Without `latest`, the folder above is no checkpoint of a training."""
    folder = trainer_checkpoint(tmp_path / "some", "zero2", latest=False)
    assert open_weights(str(folder / "global_step7")).companions == {}
