"""Runs mergekit on tiny Llamas and keeps what it resolved and computed, so that the tests run without it.

    python tests/support/make_mergekit_fixtures.py     in an environment with mergekit 0.1.5, torch, CPU

For every CASE.yml in tests/pretrain/merge/mergekit/ writes CASE.json (for every output tensor the parameters that
mergekit resolved, and the tensors it read) and, except where it draws random numbers, CASE.safetensors (what it
computed). The models there are made by this script when they are missing: a, b and c are alike; d to g have one layer
and tokenizers of different tokens; d and f have rows beyond them, and g has a token beyond its rows.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

FIXTURES = Path(__file__).parents[1] / "pretrain/merge/mergekit/fixtures"
LAYERS, WIDTH, VOCABULARY = 4, 4, 6
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
TOKENS = {
    "d": (["<unk>", "sun", "moon"], ["<s>"]),
    "e": (["<unk>", "moon", "sky", "sun"], ["<s>", "<img>"]),
    "f": (["<unk>", "sun", "moon", "sky"], ["<pad>", "<s>"]),
    "g": (["<unk>", "sun", "rain"], ["<s>", "<pad>"]),
}
BEYOND = {"g": -1}  # rows, compared with the tokens


def write_model(folder: Path, seed: int, layers: int = LAYERS, rows: int = VOCABULARY) -> None:
    random = np.random.default_rng(seed)
    shapes = {
        "model.embed_tokens.weight": (rows, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (rows, WIDTH),
    }
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{x}_proj.weight": (WIDTH, WIDTH) for x in "qkvo"}
        shapes |= {f"{at}mlp.{x}_proj.weight": (WIDTH, WIDTH) for x in ("up", "gate", "down")}
        shapes |= {f"{at}{x}_layernorm.weight": (WIDTH,) for x in ("input", "post_attention")}
    folder.mkdir(parents=True)
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = CONFIG | {"num_hidden_layers": layers, "vocab_size": rows}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def write_tokenizer(folder: Path, words: list[str], added: list[str]) -> None:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": len(words) + i, "content": one, **plain} for i, one in enumerate(added)],
        "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": "<unk>"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content, indent=1) + "\n")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<s>", "chat_template": words[-1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")


def resolved(planner: Any) -> dict[str, Any]:
    """Tensor -> [base, shared parameters, [[model, tensor there (null: the same name), parameter, ...], ...]]."""
    found = {}
    for weight, task in planner._tensors:
        inputs = []
        gathered = task.gather_tensors
        for model, info in getattr(gathered, "gather_tensors", gathered).weight_info.items():
            own = dict(task.input_parameters[model].items())
            numbers = {
                name: own[name] for name in ("weight", "density", "scale") if own.get(name) is not None
            }
            inputs.append([model.model.path, None if info.name == weight.name else info.name, numbers])
        base = task.base_model.model.path if task.base_model is not None else None
        found[weight.name] = [base, dict(task.parameters.items()), inputs]
    return found


def vocabulary(path: Path) -> dict[str, int]:
    """Token -> row in a tokenizer.json that mergekit wrote; empty where it wrote none."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    return content["model"]["vocab"] | {one["content"]: one["id"] for one in content["added_tokens"]}


def run(path: Path) -> None:
    import yaml
    from mergekit import plan
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    planners: list[Any] = []
    inner = plan.MergePlanner._plan

    def kept(self: Any) -> None:
        inner(self)
        planners.append(self)

    plan.MergePlanner._plan = kept
    text = path.read_text()
    try:
        with tempfile.TemporaryDirectory() as out:
            options = MergeOptions(copy_tokenizer=False, write_model_card=False)
            run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), out, options)
            if "dare" not in text:
                shutil.copy(
                    Path(out) / next(n for n in os.listdir(out) if n.endswith(".safetensors")),
                    path.with_suffix(".safetensors"),
                )
            layers = json.loads((Path(out) / "config.json").read_text())["num_hidden_layers"]
            tokens = vocabulary(Path(out) / "tokenizer.json")
    finally:
        plan.MergePlanner._plan = inner
    content = {"num_hidden_layers": layers, "tensors": resolved(planners[-1])}
    content |= {"tokens": tokens} if tokens else {}
    text = json.dumps(content, sort_keys=True, separators=(",", ":")).replace(',"model.', ',\n"model.')
    path.with_suffix(".json").write_text(text + "\n")


def main() -> None:
    for seed, name in enumerate("abc"):
        if not (FIXTURES / name).exists():
            write_model(FIXTURES / name, seed)
    for seed, (name, (words, added)) in enumerate(TOKENS.items(), 3):
        if not (FIXTURES / name).exists():
            rows = len(words) + len(added) + BEYOND.get(name, seed % 2)
            write_model(FIXTURES / name, seed, 1, rows)
            write_tokenizer(FIXTURES / name, words, added)
    os.chdir(FIXTURES)
    for path in sorted(FIXTURES.glob("*.yml")):
        print(path.name)
        run(path)


if __name__ == "__main__":
    main()
