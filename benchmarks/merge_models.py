"""Writes models of realistic size in seconds: Llamas in safetensors, and ZeRO-3 checkpoints of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.merge.planning.output_layout import INDEX, lay_out
from pretrain.weights.dtypes import DTYPES, TensorInfo, elements

POOL = 1 << 22  # random numbers; every tensor is a slice of them with its own offset


@dataclass(frozen=True)
class Llama:
    """The sizes of a Llama, from which its parameter shapes follow."""

    width: int = 2048
    inner: int = 5632
    layers: int = 14
    vocabulary: int = 32000

    def shapes(self) -> dict[str, tuple[int, ...]]:
        square, up = (self.width, self.width), (self.inner, self.width)
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.width)}
        for layer in range(self.layers):
            own: dict[str, tuple[int, ...]] = {f"self_attn.{part}_proj.weight": square for part in "qkvo"}
            own |= {"mlp.gate_proj.weight": up, "mlp.up_proj.weight": up, "mlp.down_proj.weight": up[::-1]}
            own |= {f"{place}_layernorm.weight": (self.width,) for place in ("input", "post_attention")}
            found |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
        return found | {"model.norm.weight": (self.width,), "lm_head.weight": (self.vocabulary, self.width)}

    @property
    def parameters(self) -> int:
        return sum(map(elements, self.shapes().values()))

    def config(self) -> dict[str, object]:
        """config.json for transformers."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.width,
            "intermediate_size": self.inner, "num_hidden_layers": self.layers, "num_attention_heads": 16,
            "num_key_value_heads": 16, "vocab_size": self.vocabulary, "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        }  # fmt: skip


class Numbers:
    """Weights of one model: normally distributed with a realistic scale, close to those of other seeds."""

    def __init__(self, seed: int) -> None:
        shared, own = (np.random.default_rng(s).standard_normal(POOL, np.float32) for s in (0, seed + 1))
        self._pool = 0.02 * shared + 0.002 * own

    def tensor(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """The tensor in stored form (F32 or BF16), flat."""
        pool = self._pool if dtype == "F32" else (self._pool.view(np.uint32) >> 16).astype(np.uint16)
        start = sum(name.encode()) * 7919 % POOL
        return np.resize(np.roll(pool, -start), elements(shape))


def write_safetensors(folder: Path, model: Llama, seed: int, dtype: str = "BF16", shards: int = 4) -> Path:
    """Writes a folder as transformers does."""
    folder.mkdir(parents=True)
    numbers = Numbers(seed)
    tensors: dict[str, TensorInfo] = {name: (dtype, shape) for name, shape in model.shapes().items()}
    size = model.parameters * DTYPES[dtype].itemsize
    laid = lay_out(tensors, size if shards == 1 else int(size / (shards - 0.5)))
    for number, file in enumerate(laid.files):
        with open(folder / file.name, "wb") as output:
            output.write(file.header)
            placed = {name: at for name, (where, at) in laid.places.items() if where == number}
            for name in sorted(placed, key=placed.__getitem__):
                output.write(numbers.tensor(name, tensors[name][1], dtype).tobytes())
    if laid.index is not None:
        (folder / INDEX).write_bytes(laid.index)
    (folder / "config.json").write_text(json.dumps(model.config()))
    return folder


def write_zero3(folder: Path, model: Llama, seed: int, ranks: int) -> Path:
    """The same weights in fp32 as a DeepSpeed ZeRO-3 checkpoint, where every tensor is split over all ranks."""
    import torch

    folder.mkdir(parents=True)
    numbers = Numbers(seed)
    flat: list[list[np.ndarray]] = [[] for _ in range(ranks)]
    for name, shape in model.shapes().items():
        values = numbers.tensor(name, shape, "F32")
        part = -(-len(values) // ranks)
        for rank, cut in enumerate(np.pad(values, (0, part * ranks - len(values))).reshape(ranks, part)):
            flat[rank].append(cut)
    for rank, parts in enumerate(flat):
        state = {
            "param_shapes": [{name: torch.Size(shape) for name, shape in model.shapes().items()}],
            "module": {name: torch.empty(0, dtype=torch.bfloat16) for name in model.shapes()},
            "buffer_names": [], "shared_params": {}, "frozen_param_shapes": None, "frozen_param_fragments": None,
        }  # fmt: skip
        torch.save(state, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        optimizer = {"fp32_flat_groups": [torch.from_numpy(np.concatenate(parts))], "partition_count": ranks}
        path = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer}, path)
    return folder
