"""Models saved by transformers and open_clip: merged, loaded again, equal to the mean computed in torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pretrain.merge import merge, open_weights
from pretrain.merge.execute import execute
from pretrain.merge.spec import load_spec, prepare_spec
from pretrain.merge.vocabulary.align import vocabulary_names

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TEXT = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 16, "eos_token_id": 2,
}  # fmt: skip
SEEN = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4, "projection_dim": 16,
}  # fmt: skip
WHISPER = {
    "vocab_size": 64, "num_mel_bins": 8, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
    "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 3, "begin_suppress_tokens": None, "suppress_tokens": None,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES, "ids"),
    "qwen2, tied": ("Qwen2ForCausalLM", "Qwen2Config", SIZES | {"tie_word_embeddings": True}, "ids"),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", SIZES | {"head_dim": 8}, "ids"),
    "gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", SIZES | {"head_dim": 8}, "ids"),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig",
                SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1}, "ids"),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig",
                 {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}, "ids"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2,
                                               "bos_token_id": 1, "eos_token_id": 2}, "ids"),
    "bert": ("BertForMaskedLM", "BertConfig", {k: v for k, v in TEXT.items() if k != "eos_token_id"}, "ids"),
    "t5": ("T5ForConditionalGeneration", "T5Config",
           {"vocab_size": 32, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2,
            "decoder_start_token_id": 0}, "both"),
    "mamba": ("MambaForCausalLM", "MambaConfig",
              {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}, "ids"),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, "sound"),
    "clip": ("CLIPModel", "CLIPConfig", {"text_config": TEXT, "vision_config": SEEN, "projection_dim": 16}, "pair"),
    "siglip": ("SiglipModel", "SiglipConfig", {"text_config": TEXT, "vision_config": SEEN}, "pair"),
    "llava": ("LlavaForConditionalGeneration", "LlavaConfig",
              {"text_config": SIZES | {"model_type": "llama"},
               "vision_config": SEEN | {"num_hidden_layers": 2, "model_type": "clip_vision_model"},
               "image_token_id": 31, "image_token_index": 31}, "pixels in text"),
    "vit": ("ViTForImageClassification", "ViTConfig",
            {k: v for k, v in SEEN.items() if k != "projection_dim"}, "pixels"),
}  # fmt: skip


def example_inputs(kind: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 26, (2, 6), generator=draw)
    pixels = torch.randn(2, 3, 8, 8, generator=draw)
    sound = torch.randn(2, 8, 32, generator=draw)
    with_images = ids.clone()
    with_images[:, 1:5] = 31
    return {
        "ids": {"input_ids": ids},
        "both": {"input_ids": ids, "decoder_input_ids": ids},
        "sound": {"input_features": sound, "decoder_input_ids": ids},
        "pair": {"input_ids": ids, "pixel_values": pixels},
        "pixels": {"pixel_values": pixels},
        "pixels in text": {"input_ids": with_images, "pixel_values": pixels},
    }[kind]


@torch.no_grad()
def logits(model: Any, kind: str) -> torch.Tensor:
    found = model.eval()(**example_inputs(kind))
    return found.logits_per_image if kind == "pair" else found.logits


@torch.no_grad()
def perturbed(model: Any, seed: int) -> Any:
    """The model with every parameter moved away from its initial value, which is often 0 or 1."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)
    return model


def mean(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], beta: float) -> dict[str, torch.Tensor]:
    return {
        name: (beta * a[name].double() + (1 - beta) * b[name].double()).to(a[name].dtype)
        if a[name].is_floating_point()
        else a[name]
        for name in a
    }


@pytest.mark.parametrize("kind", MODELS)
def test_transformers(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model_name, config_name, sizes, what = MODELS[kind]
    model_class = getattr(transformers, model_name)
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        made.append(perturbed(model_class(getattr(transformers, config_name)(**sizes)), seed))
        made[-1].save_pretrained(tmp_path / str(seed))
    merge([str(tmp_path / "0"), str(tmp_path / "1")], tmp_path / "out", beta=0.25)
    loaded, how = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(how.values()), how
    a, b = made
    a.load_state_dict(mean(a.state_dict(), b.state_dict(), 0.25))
    wanted = logits(a, what)
    assert wanted.isfinite().all()
    assert not torch.equal(wanted, logits(b, what))
    assert torch.equal(logits(loaded, what), wanted)


@pytest.mark.parametrize("kind", ["llama", "qwen2, tied", "gemma 3", "mixtral", "gpt-neox", "gpt2", "mamba"])
def test_layers_of_two_models_stacked_by_a_mergekit_file(kind: str, tmp_path: Path) -> None:
    """Loads with more layers than either input, and has the outputs of one model with the same layers."""
    transformers = pytest.importorskip("transformers")
    model_name, config_name, sizes, what = MODELS[kind]
    model_class, config = getattr(transformers, model_name), getattr(transformers, config_name)
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        made.append(perturbed(model_class(config(**sizes)), seed))
        made[-1].save_pretrained(tmp_path / str(seed))
    count = made[0].config.num_hidden_layers
    slices = [
        {"sources": [{"model": str(tmp_path / "0"), "layer_range": [0, count]}]},
        {"sources": [{"model": str(tmp_path / "1"), "layer_range": [count - 1, count]}]},
    ]
    (tmp_path / "x.yml").write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": slices}))
    plan, opened = prepare_spec(load_spec(tmp_path / "x.yml"))
    execute([plan], opened, [tmp_path / "out"])
    loaded, how = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(how.values()), how
    a, b = (model.state_dict() for model in made)
    state = loaded.state_dict()
    last = [name for name in state if f".{count}." in name]
    assert last
    for name in state:
        source = b if name in last or name not in a else a
        theirs = name.replace(f".{count}.", f".{count - 1}.") if name in last else name
        outside = not any(f".{number}." in name for number in range(count + 1))
        if outside and "embed" not in name and "wte" not in name and "wpe" not in name:
            source = a if loaded.config.tie_word_embeddings and name == "lm_head.weight" else b
        assert torch.equal(state[name], source[theirs]), name
    assert logits(loaded, what).isfinite().all()


OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", TEXT),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", TEXT | {"embedding_size": 16}),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig",
                   TEXT | dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 1)),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 16, "n_layer": 1, "n_head": 2}),
    "opt": ("OPTForCausalLM", "OPTConfig", TEXT | {"ffn_dim": 16, "word_embed_proj_dim": 16}),
    "xlnet": ("XLNetLMHeadModel", "XLNetConfig", {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}),
    "rwkv": ("RwkvForCausalLM", "RwkvConfig", {"hidden_size": 16, "num_hidden_layers": 2}),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*(kind for kind in MODELS if kind != "vit"), *OTHERS])
def test_every_tensor_with_a_row_for_each_token_is_known(kind: str, tmp_path: Path) -> None:
    """A tensor that is not recognised would be mixed with rows of other tokens."""
    transformers = pytest.importorskip("transformers")
    model_name, config_name, sizes = (MODELS | OTHERS)[kind][:3]
    if "text_config" in sizes:
        sizes = sizes | {"text_config": sizes["text_config"] | {"vocab_size": 79}}
    else:
        sizes = sizes | {"vocab_size": 79}
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**sizes))
    model.save_pretrained(tmp_path)
    source = open_weights(str(tmp_path))
    rows = {name for name in source.names() if source.info(name)[1][:1] == (79,)}
    assert rows
    assert rows == set(vocabulary_names(source))


def test_companion_files_of_a_vision_language_model(tmp_path: Path) -> None:
    """Processor, tokenizer, chat template and generation settings are copied; code is neither copied nor run."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<unk>": 0, "a": 1, "<image>": 2}, unk_token="<unk>")),
        unk_token="<unk>", pad_token="<unk>",
    )  # fmt: skip
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size={"height": 8, "width": 8}, crop_size=8),
        tokenizer=tokenizer, patch_size=4, chat_template=template, image_token="<image>",
    )  # fmt: skip
    model_name, config_name, sizes, _ = MODELS["llava"]
    for seed in range(2):
        torch.manual_seed(seed)
        model = getattr(transformers, model_name)(getattr(transformers, config_name)(**sizes))
        model.generation_config.max_length = 9
        model.save_pretrained(tmp_path / str(seed))
        processor.save_pretrained(tmp_path / str(seed))
        (tmp_path / str(seed) / "modeling_mine.py").write_text("raise SystemExit('ran')")
    merge([str(tmp_path / "0"), str(tmp_path / "1")], tmp_path / "out", beta=0.5)
    beside = {path.name: path.read_bytes() for path in (tmp_path / "0").iterdir()}
    out = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for name in beside.keys() - {"model.safetensors", "modeling_mine.py"}:
        assert out[name] == beside[name], name
    assert {"chat_template.jinja", "tokenizer.json", "generation_config.json"} <= out.keys()
    assert "modeling_mine.py" not in out
    assert any("modeling_mine.py not copied" in note for note in open_weights(str(tmp_path / "0")).notes)
    back = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert back.apply_chat_template([{"role": "user", "content": "a"}]) == "a"
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").max_length == 9


@pytest.mark.parametrize("form", ["folder", "safetensors", "training"])
def test_open_clip(form: str, tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    from safetensors.torch import save_file

    settings = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 8, "layers": 1, "width": 64, "patch_size": 4},
        "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
    }
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(perturbed(open_clip.model.CLIP(**settings), seed))
        state = {name: value.contiguous() for name, value in models[-1].state_dict().items()}
        folder = tmp_path / str(seed)
        folder.mkdir()
        if form == "folder":
            save_file(state, folder / "open_clip_model.safetensors")
            config = {"model_cfg": settings, "preprocess_cfg": {"mean": [0.5] * 3}}
            (folder / "open_clip_config.json").write_text(json.dumps(config))
        elif form == "safetensors":
            save_file(state, folder / "x.safetensors")
        else:
            checkpoint = {
                "epoch": 3,
                "state_dict": {f"module.{name}": value for name, value in state.items()},
            }
            torch.save(checkpoint, folder / "epoch_3.pt")
    given_names = {"folder": "", "safetensors": "x.safetensors", "training": "epoch_3.pt"}
    inputs = [str(tmp_path / str(seed) / given_names[form]) for seed in range(2)]
    merge(inputs, tmp_path / "out", beta=0.25)
    loaded = open_clip.model.CLIP(**settings)
    open_clip.load_checkpoint(loaded, str(tmp_path / "out/model.safetensors"))
    a, b = models
    a.load_state_dict(mean(a.state_dict(), b.state_dict(), 0.25))
    pixels, ids = torch.randn(2, 3, 8, 8), torch.randint(3, 26, (2, 8))
    with torch.no_grad():
        for x, y in zip(loaded.eval()(pixels, ids), a.eval()(pixels, ids), strict=True):
            assert torch.equal(x, y)
    if form == "folder":
        assert (tmp_path / "out/open_clip_config.json").is_file()
        local = open_clip.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=None)
        with torch.no_grad():
            for x, y in zip(local.eval()(pixels, ids), a(pixels, ids), strict=True):
                assert torch.equal(x, y)
