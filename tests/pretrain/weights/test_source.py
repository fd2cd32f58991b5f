"""Every weight format as its own library writes it, with ties, companions and lineage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from data_pipeline.errors import UserError
from pretrain.merge import merge
from pretrain.weights.companions import adapted_config
from pretrain.weights.source import WeightSource, open_weights
from pretrain.weights.tied_weights import tied_names
from tests.pretrain.weights.formats.test_zero_layout import numbered, stage_2
from tests.support.merge_inputs import floats, write

torch = pytest.importorskip("torch")

STATE = {"a.w": (5, 3), "b": (7,), "c.w": (2, 2, 2)}


def state(seed: int = 0) -> dict[str, Any]:
    return {name: torch.from_numpy(floats(seed + i, *shape)) for i, (name, shape) in enumerate(STATE.items())}


def holds(source: WeightSource, tensors: dict[str, Any]) -> None:
    assert sorted(source.names()) == sorted(tensors)
    for name, tensor in tensors.items():
        got = source.array(name)
        wanted = tensor.float() if tensor.is_floating_point() else tensor
        assert (got.shape, got.tobytes()) == (tuple(tensor.shape), wanted.numpy().tobytes()), name


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {
            "epoch": 3,
            "name": "run",
            "state_dict": {f"module.{n}": t for n, t in s.items()},
            "optimizer": {},
        },
        lambda s: {"epoch": 3, "state_dict": s},
        lambda s: {"model": s, "args": __import__("argparse").Namespace(lr=0.1)},
        lambda s: {"model_state_dict": s, "step": 3},
    ],
    ids=["plain", "open_clip_training", "state_dict", "with_arguments", "model_state_dict"],
)
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pth"])
def test_state_dicts_wherever_they_stand(tmp_path: Path, wrap: Any, suffix: str) -> None:
    torch.save(wrap(state()), tmp_path / f"x{suffix}")
    holds(open_weights(str(tmp_path / f"x{suffix}")), state())


def test_an_open_clip_training_loads_and_merges(tmp_path: Path) -> None:
    """Floats and counters are read under open_clip's names; a merge with beta 0.5 gives the mean."""
    CLIP = pytest.importorskip("open_clip.model").CLIP
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        vision = {"image_size": 32, "layers": (1, 1, 1, 1), "width": 8}
        text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
        made.append(CLIP(16, vision, text))
        weights = {f"module.{name}": tensor for name, tensor in made[-1].state_dict().items()}
        torch.save({"epoch": 1, "name": "x", "state_dict": weights}, tmp_path / f"{seed}.pt")
    holds(open_weights(str(tmp_path / "0.pt")), made[0].state_dict())
    merge([str(tmp_path / "0.pt"), str(tmp_path / "1.pt")], tmp_path / "out", beta=0.5)
    merged = load_file(tmp_path / "out/model.safetensors")
    made[0].load_state_dict({name: torch.from_numpy(value) for name, value in merged.items()})
    a, b = (torch.load(tmp_path / f"{i}.pt", weights_only=True)["state_dict"] for i in range(2))
    name = "visual.conv1.weight"
    mean = (a[f"module.{name}"].double() + b[f"module.{name}"].double()) / 2
    assert torch.equal(made[0].state_dict()[name], mean.float())


def test_sharded_pickles_through_their_index(tmp_path: Path) -> None:
    tensors = state()
    placed = {}
    for number, name in enumerate(tensors, 1):
        file = f"pytorch_model-0000{number}-of-00003.bin"
        torch.save({name: tensors[name]}, tmp_path / file)
        placed[name] = file
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (tmp_path / "training_args.bin").write_bytes(b"not opened")
    holds(open_weights(str(tmp_path)), tensors)


def test_safetensors_go_before_pickles(tmp_path: Path) -> None:
    write(tmp_path, {"w": floats(1, 3)})
    torch.save({"w": torch.zeros(9)}, tmp_path / "pytorch_model.bin")
    assert open_weights(str(tmp_path)).info("w") == ("F32", (3,))


def test_memory_that_pickles_share_is_one_weight(tmp_path: Path) -> None:
    weight = torch.randn(4, 2)
    torch.save({"embed": weight, "head": weight, "row": weight[:2]}, tmp_path / "x.pt")
    source = open_weights(str(tmp_path / "x.pt"))
    assert (source.names(), source.tied) == (["embed", "row"], {"head": "embed"})


@pytest.mark.parametrize("prefix", ["", "bf16_"])
def test_a_deepspeed_folder_of_someone_else(tmp_path: Path, prefix: str) -> None:
    """The folder passed to `save_checkpoint`: `latest` names the tag; more than ten ranks."""
    made = numbered([[(13, 5), (70,)], [(3, 11)]])
    folder = tmp_path / "out/global_step12"
    folder.mkdir(parents=True)
    stage_2(folder, made, 11)
    for path in folder.glob("zero_pp_rank_*"):
        path.rename(folder / f"{prefix}{path.name}")
    (tmp_path / "out/latest").write_text("global_step12")
    (tmp_path / "out/zero_to_fp32.py").write_text("raise SystemExit('never run')")
    for address in (tmp_path / "out", folder):
        source = open_weights(str(address))
        assert source.located.kind == "checkpoint"
        for name, array in ((n, a) for group in made for n, a in group.items()):
            assert source.array(name).tobytes() == array.tobytes()


def test_universal_checkpoints_flat_or_in_shape(tmp_path: Path) -> None:
    tensors = state()
    for name, tensor in tensors.items():
        folder = tmp_path / "zero" / name
        folder.mkdir(parents=True)
        torch.save({"param": tensor.flatten() if name == "a.w" else tensor}, folder / "fp32.pt")
        torch.save(tensor, folder / "exp_avg.pt")
    shapes = [{name: t.shape for name, t in tensors.items()}]
    torch.save({"module": {}, "param_shapes": shapes}, tmp_path / "mp_rank_00_model_states.pt")
    holds(open_weights(str(tmp_path)), tensors)
    (tmp_path / "zero/b/fp32.pt").unlink()
    with pytest.raises(UserError, match=r"zero/b: contains no fp32\.pt"):
        open_weights(str(tmp_path))


def hub_cache(root: Path, files: dict[str, bytes]) -> None:
    """A cache folder in the layout of huggingface_hub."""
    repository = root / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for number, (name, content) in enumerate(files.items()):
        (repository / "blobs" / str(number)).write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{number}")


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_the_hub_from_its_cache_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    write(tmp_path / "made", {"w": floats(3, 4)})
    torch.save({"w": torch.from_numpy(floats(3, 4))}, tmp_path / "made/m.bin")
    name, file = {
        "safetensors": ("model.safetensors", "model.safetensors"), "pickle": ("pytorch_model.bin", "m.bin"),
    }[kind]  # fmt: skip
    hub_cache(tmp_path / "hub", {name: (tmp_path / "made" / file).read_bytes(), "config.json": b'{"a": 1}'})
    for address in ("hf://org/name", "hf://org/name@main", f"hf://org/name@{'0' * 40}"):
        source = open_weights(address)
        assert source.array("w").tobytes() == floats(3, 4).tobytes()
        assert source.lineage == {"hf://org/name"}
        assert set(source.companions) == {"config.json"}
    for address in ("hf://org/absent", "hf://org/name@other"):
        with pytest.raises(
            UserError, match=f"{address}: is not in the cache, and the hub does not answer"
        ) as caught:
            open_weights(address)
        assert "\n" not in str(caught.value)


def test_open_clip_names_are_looked_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretrained = pytest.importorskip("open_clip.pretrained")
    with pytest.raises(UserError, match=r"ViT-B-32 has the tags .*laion2b_s34b_b79k"):
        open_weights("open_clip://ViT-B-32/nothing")
    with pytest.raises(UserError, match="no weights for 'Nothing'"):
        open_weights("open_clip://Nothing/tag")
    torch.save(state(), tmp_path / "cached.bin")
    monkeypatch.setattr(pretrained, "download_pretrained", lambda known: str(tmp_path / "cached.bin"))
    holds(open_weights("open_clip://ViT-B-32/laion2b_s34b_b79k"), state())

    def offline(known: Any) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(pretrained, "download_pretrained", offline)
    with pytest.raises(
        UserError, match="laion2b_s34b_b79k: is not in the cache, and the hub does not answer"
    ):
        open_weights("open_clip://ViT-B-32/laion2b_s34b_b79k")


TIED_MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 2}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"num_key_value_heads": 2}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 16, "n_layer": 1, "n_head": 2}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "opt": ("OPTConfig", "OPTForCausalLM", {"ffn_dim": 16, "word_embed_proj_dim": 16}),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"n_layer": 1, "n_head": 2}),
    "t5": ("T5Config", "T5ForConditionalGeneration", {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2}),
    "bert": ("BertConfig", "BertForMaskedLM", {}),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", {}),
    "mamba": ("MambaConfig", "MambaForCausalLM", {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", TIED_MODELS)
def test_what_transformers_ties_is_tied(tmp_path: Path, kind: str) -> None:
    """A tiny model saved by transformers: its names that are not stored are exactly our tied names."""
    transformers = pytest.importorskip("transformers")
    config_class, model_class, more = TIED_MODELS[kind]
    sizes = {
        "vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 16, "tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes | more))
    model.save_pretrained(tmp_path)
    source = open_weights(str(tmp_path))
    own = model.state_dict()
    pointers = {name: own[name].data_ptr() for name in own}
    absent = set(own) - set(source.names())
    assert absent, "the model ties something"
    for alias in absent:
        assert pointers[alias] == pointers[source.tied[alias]], alias


def test_an_untied_config_ties_nothing() -> None:
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    head = {"architectures": ["LlamaForCausalLM"]}
    assert tied_names(names, head | {"tie_word_embeddings": False}) == {}
    assert tied_names(names, head) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert tied_names(names, {"architectures": ["LlamaModel"]}) == {}
    assert tied_names(names, {"text_config": {"tie_word_embeddings": True}}) != {}
    assert tied_names(names, None) == {}
    assert tied_names([*names, "lm_head.weight"], head) == {}


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_that_is_stored_too(tmp_path: Path, equal: bool) -> None:
    embed = floats(1, 6, 4)
    head = embed if equal else floats(2, 6, 4)
    folder = write(tmp_path, {"model.embed_tokens.weight": embed, "lm_head.weight": head.copy()})
    (folder / "config.json").write_text('{"tie_word_embeddings": true}')
    source = open_weights(str(folder))
    assert source.tied == ({"lm_head.weight": "model.embed_tokens.weight"} if equal else {})
    assert ("lm_head.weight" in source.names()) is not equal


def test_code_is_never_copied(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = write(tmp_path / name, {"w": floats(1, 4)})
        (folder / "modeling_x.py").write_text("raise SystemExit")
        config = {"auto_map": {"AutoModel": "modeling_x.X"}, "hidden_size": 3, "é": "ü"}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer_config.json").write_text(
            '{"auto_map": {"AutoTokenizer": ["x.T", null]}, "y": 1}'
        )
        (folder / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
        (folder / "tokenization_x.py").write_text("raise SystemExit")
    source = open_weights(str(tmp_path / "a"))
    assert sum("auto_map" in note for note in source.notes) == 2
    assert any("modeling_x.py, tokenization_x.py not copied" in note for note in source.notes)
    merge([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out", beta=0.5)
    assert not list((tmp_path / "out").glob("*.py"))
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"hidden_size": 3, "é": "ü"}
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == {"y": 1}


def test_a_config_is_changed_where_its_keys_stand() -> None:
    config = {
        "vocab_size": 3,
        "text_config": {"vocab_size": 3, "x": 1},
        "auto_map": {},
        "vision_config": {"vocab_size": 9},
    }
    assert adapted_config(config, {"vocab_size": 8}) == {
        "vocab_size": 8, "text_config": {"vocab_size": 8, "x": 1}, "vision_config": {"vocab_size": 9},
    }  # fmt: skip
    assert config["vocab_size"] == 3
    assert adapted_config({"text_config": {"vocab_size": 3}}, {"vocab_size": 8}) == {
        "text_config": {"vocab_size": 8}
    }
    with pytest.raises(UserError, match="has no vocab_size"):
        adapted_config({}, {"vocab_size": 8})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, set()),
        ({"config.json": '{"_name_or_path": "org/base"}'}, {"hf://org/base"}),
        ({"config.json": '{"_name_or_path": "/home/me/x"}'}, set()),
        ({"config.json": '{"_name_or_path": "./out/x"}'}, set()),
        ({"README.md": "---\nbase_model:\n- org/a\n- org/b\nx: 1\n---\ntext"}, {"hf://org/a", "hf://org/b"}),
        ({"README.md": "---\nbase_model: [\n---\n"}, set()),
        ({"README.md": "# no front matter\n---\nbase_model: a/b\n---\n"}, set()),
        (
            {
                "merge.json": '{"inputs": [{"address": "hf://o/a@main", "lineage": ["hf://o/c"]}, {"address": "x"}]}'
            },
            {"hf://o/a", "hf://o/c"},
        ),
    ],
)
def test_lineage_is_what_the_files_say(tmp_path: Path, files: dict[str, str], expected: set[str]) -> None:
    folder = write(tmp_path / "m", {"w": np.zeros(2, np.float32)})
    for name, text in files.items():
        (folder / name).write_text(text)
    assert open_weights(str(folder)).lineage == expected
