"""Initial weights as a safetensors file, and the the moments in a DeepSpeed checkpoint of a run."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.reference.training import NOT_DECAYED

Shapes = dict[str, tuple[int, ...]]


def block_shapes(prefix: str, layers: int, width: int) -> Shapes:
    """Parameters of open_clip's transformer blocks."""
    found: Shapes = {}
    for number in range(layers):
        block = f"{prefix}transformer.resblocks.{number}"
        found |= {
            f"{block}.{norm}.{part}": (width,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")
        }
        found |= {
            f"{block}.attn.in_proj_weight": (3 * width, width),
            f"{block}.attn.in_proj_bias": (3 * width,),
            f"{block}.attn.out_proj.weight": (width, width),
            f"{block}.attn.out_proj.bias": (width,),
            f"{block}.mlp.c_fc.weight": (4 * width, width),
            f"{block}.mlp.c_fc.bias": (4 * width,),
            f"{block}.mlp.c_proj.weight": (width, 4 * width),
            f"{block}.mlp.c_proj.bias": (width,),
        }
    return found


def flip_shapes(model: Mapping[str, Any], size: int, length: int, vocabulary: int) -> Shapes:
    """Parameters of open_clip's CLIP."""
    vision, text, embed = model["vision"], model["text"], model["embed"]
    width, patch = vision["width"], vision["patch"]
    found: Shapes = {
        "visual.class_embedding": (width,),
        "visual.positional_embedding": ((size // patch) ** 2 + 1, width),
        "visual.proj": (width, embed),
        "visual.conv1.weight": (width, 3, patch, patch),
        "positional_embedding": (length, text["width"]),
        "token_embedding.weight": (vocabulary, text["width"]),
        "text_projection": (text["width"], embed),
    }
    for norm, of in (("visual.ln_pre", vision), ("visual.ln_post", vision), ("ln_final", text)):
        found |= {f"{norm}.{part}": (of["width"],) for part in ("weight", "bias")}
    found |= block_shapes("visual.", vision["layers"], width)
    return found | block_shapes("", text["layers"], text["width"])


def sphinx_shapes(llm: Mapping[str, Tensor], hidden: int, tower_width: int | None) -> Shapes:
    """Parameters of SPHINX: transformers' own names below `llm.`, the connector and the image delimiters."""
    found: Shapes = {f"llm.{name}": tuple(tensor.shape) for name, tensor in llm.items()}
    if tower_width is None:
        return found
    return found | {
        "connector.0.linear.weight": (hidden, tower_width),
        "connector.0.linear.bias": (hidden,),
        "connector.0.norm.weight": (hidden,),
        "connector.0.norm.bias": (hidden,),
        "start_image": (1, 1, hidden),
        "end_image": (1, 1, hidden),
    }


def draw(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """Random float32 weights; norms and biases are random too, so that no factor of 1 or term of 0 hides a mistake."""
    generator = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes.items():
        is_norm = len(shape) == 1 and name.endswith("weight")
        scale = 0.1 if len(shape) < 2 else prod(shape[1:]) ** -0.5
        values = generator.standard_normal(shape) * scale + (1.0 if is_norm else 0.0)
        found[name] = torch.tensor(values, dtype=torch.float32)
    return found


def sincos(width: int, grid: int) -> Tensor:
    """Fixed 2-D sine and cosine embeddings, zero for the class token (He et al. 2022, MAE; FLIP, section 3.1)."""
    rows = [[0.0] * width]
    rates = [10000.0 ** (-k / (width // 4)) for k in range(width // 4)]
    for y in range(grid):
        for x in range(grid):
            row: list[float] = []
            for place in (x, y):
                row += [*(np.sin(place * rate) for rate in rates), *(np.cos(place * rate) for rate in rates)]
            rows.append(row)
    return torch.tensor(rows, dtype=torch.float32)


def write(folder: Path, weights: Mapping[str, Tensor]) -> Path:
    """A folder that `init:` reads."""
    folder.mkdir(parents=True)
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@dataclass
class Saved:
    """A checkpoint: moments and weight decay of every trained parameter by name."""

    first: dict[str, Tensor]
    second: dict[str, Tensor]
    decay: dict[str, float]


def read_moments(folder: Path, trained: Container[str]) -> Saved:
    """AdamW's moments in a DeepSpeed checkpoint of any ZeRO stage; `trained`: names of the trained parameters.

    Stage 0 stores torch's optimizer state, without names. Stages 1 and 2 store one vector per parameter group, split
    over the ranks. Stage 3 pads every parameter to a multiple of the ranks and gives each rank an equal part.
    """
    model = load(min(folder.glob("*mp_rank_00_model_states.pt")))
    ranks = [load(path)["optimizer_state_dict"] for path in sorted(folder.glob("*_optim_states.pt"))]
    if not ranks:
        groups, split = stage_0_groups(model, trained), stage_0
        states = [model["optimizer"]]
    else:
        groups = [{name: tuple(shape) for name, shape in group.items()} for group in model["param_shapes"]]
        is_stage_3 = int(ranks[0]["zero_stage"]) == 3
        split = stage_3 if is_stage_3 else stages_1_and_2
        states = [rank["optimizer_state_dict" if is_stage_3 else "base_optimizer_state"] for rank in ranks]
    found = Saved({}, {}, {})
    for key, into in (("exp_avg", found.first), ("exp_avg_sq", found.second)):
        split(groups, [state["state"] for state in states], key, into)
    for group, options in zip(groups, states[0]["param_groups"], strict=True):
        found.decay |= dict.fromkeys(group, options["weight_decay"])
    return found


States = list[dict[int, dict[str, Tensor]]]


def stages_1_and_2(groups: list[Shapes], states: States, key: str, into: dict[str, Tensor]) -> None:
    for number, group in enumerate(groups):
        vector = torch.cat([state[number][key] for state in states])
        at = 0
        for name, shape in group.items():
            into[name] = vector[at : at + prod(shape)].reshape(shape)
            at += prod(shape)


def stage_3(groups: list[Shapes], states: States, key: str, into: dict[str, Tensor]) -> None:
    for number, group in enumerate(groups):
        at = 0
        for name, shape in group.items():
            part = -(-prod(shape) // len(states))
            whole = torch.cat([state[number][key][at : at + part] for state in states])
            into[name] = whole[: prod(shape)].reshape(shape)
            at += part


def stage_0(groups: list[Shapes], states: States, key: str, into: dict[str, Tensor]) -> None:
    names = [name for group in groups for name in group]
    for name, state in zip(names, states[0].values(), strict=True):
        into[name] = state[key]


def stage_0_groups(model: Mapping[str, Any], trained: Container[str]) -> list[Shapes]:
    """A group lists its parameters in the order of the module, decayed ones first."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model["module"].items() if name in trained}
    decayed = {name: shape for name, shape in shapes.items() if not NOT_DECAYED.fullmatch(name)}
    groups = [decayed, {name: shape for name, shape in shapes.items() if name not in decayed}]
    return [group for group in groups if group]


def load(path: Path) -> Any:
    """A file of a checkpoint that the test has made; DeepSpeed pickles objects that `weights_only` refuses."""
    return torch.load(path, map_location="cpu", weights_only=False)
