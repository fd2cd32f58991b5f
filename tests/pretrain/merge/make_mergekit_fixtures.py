"""Runs mergekit on tiny Llamas and keeps what it resolved and computed, so that the tests run without it.

    python tests/pretrain/merge/make_mergekit_fixtures.py     in an environment with mergekit 0.1.5, torch, CPU

For every CASE.yml in tests/pretrain/merge/mergekit/ writes CASE.json (for every output tensor the parameters that
mergekit resolved, and the tensors it read) and, except where it draws random numbers, CASE.safetensors (what it
computed). The models a, b and c there are made by this script when they are missing.
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

FIXTURES = Path(__file__).parent / "mergekit"
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


def write_model(folder: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCABULARY, WIDTH),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{x}_proj.weight": (WIDTH, WIDTH) for x in "qkvo"}
        shapes |= {f"{at}mlp.{x}_proj.weight": (WIDTH, WIDTH) for x in ("up", "gate", "down")}
        shapes |= {f"{at}{x}_layernorm.weight": (WIDTH,) for x in ("input", "post_attention")}
    folder.mkdir(parents=True)
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")


def resolved(planner: Any) -> dict[str, Any]:
    """Tensor -> [base, shared parameters, [[model, tensor there (null: the same name), parameter, ...], ...]]."""
    found = {}
    for weight, task in planner._tensors:
        inputs = []
        for model, info in task.gather_tensors.weight_info.items():
            own = dict(task.input_parameters[model].items())
            numbers = {
                name: own[name] for name in ("weight", "density", "scale") if own.get(name) is not None
            }
            inputs.append([model.model.path, None if info.name == weight.name else info.name, numbers])
        base = task.base_model.model.path if task.base_model is not None else None
        found[weight.name] = [base, dict(task.parameters.items()), inputs]
    return found


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
    finally:
        plan.MergePlanner._plan = inner
    content = {"num_hidden_layers": layers, "tensors": resolved(planners[-1])}
    text = json.dumps(content, sort_keys=True, separators=(",", ":")).replace(',"model.', ',\n"model.')
    path.with_suffix(".json").write_text(text + "\n")


def main() -> None:
    for seed, name in enumerate("abc"):
        if not (FIXTURES / name).exists():
            write_model(FIXTURES / name, seed)
    os.chdir(FIXTURES)
    for path in sorted(FIXTURES.glob("*.yml")):
        print(path.name)
        run(path)


if __name__ == "__main__":
    main()
