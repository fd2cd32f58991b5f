"""config.json of the output, where it must say something else than that of the input it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.weights.companions import as_json, read
from pretrain.weights.folder import parse_json

CONFIG = "config.json"
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")
DTYPE_KEYS = ("dtype", "torch_dtype")
NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def read_config(companions: Mapping[str, Path | bytes]) -> dict[str, Any] | None:
    """The content of config.json; None where there is none."""
    content = companions.get(CONFIG)
    found = None if content is None else parse_json(read(content), CONFIG)
    return found if isinstance(found, dict) else None


def with_dtype(companions: Mapping[str, Path | bytes], dtype: str | None) -> dict[str, Path | bytes]:
    """The dtype of the output under the key that the config has for it."""
    config = read_config(companions) if dtype is not None else None
    keys = [key for key in DTYPE_KEYS if config is not None and key in config]
    if config is None or dtype is None or not keys or all(config[key] == NAMES[dtype] for key in keys):
        return dict(companions)
    return {**companions, CONFIG: as_json(config | dict.fromkeys(keys, NAMES[dtype]))}


def with_layers(companions: Mapping[str, Path | bytes], taken: Sequence[int]) -> dict[str, Path | bytes]:
    """The number of layers, and what the config says layer by layer, for the layers `taken` in their new order."""
    config = read_config(companions)
    if config is None:
        return dict(companions)
    section = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    for key in LAYER_KEYS:
        if key in section:
            before = section[key]
            section[key] = len(taken)
            for name in LAYER_LISTS:
                kinds = section.get(name)
                if isinstance(kinds, list) and len(kinds) == before:
                    section[name] = [kinds[number] for number in taken]
    return {**companions, CONFIG: as_json(config)}
