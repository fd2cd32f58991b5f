"""Companion files of weights (config, tokenizer, chat template): selects those that an output gets; edits configs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from pretrain.weights.byte_file import open_file
from pretrain.weights.folder import Folder, parse_json, refuse_pointer

COMPANIONS = (
    "config.json", "generation_config.json", "open_clip_config.json", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "chat_template*", "tokenizer*", "normalizer.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "*.spm",
)  # fmt: skip
COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".bpe", ".vocab", ".spm")
UNPARSED = ("tokenizer.json", "vocab.json")  # large, and transformers keeps no `auto_map` in them
MAX_BYTES = 256 << 20
AUTO_MAP = "auto_map"
TEXT_SECTIONS = ("text_config", "llm_config", "language_config")
CONFIG = "config.json"
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")
DTYPE_KEYS = ("dtype", "torch_dtype")
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def companions_of(folder: Folder) -> tuple[dict[str, Path | bytes], list[str]]:
    """Return the companions of a folder and notes about what is left out.

    The companions map a file name to its path, or to its content if the file is remote or must change. Code is
    never copied: no *.py, and no `auto_map`, which makes transformers run code from the checkpoint's folder.
    """
    found: dict[str, Path | bytes] = {}
    notes: list[str] = []
    for name in folder.matching(*COMPANIONS):
        if not name.endswith(COPIED_SUFFIXES) or name.endswith(".index.json"):
            continue
        path = folder.path(name)
        found[name] = raw = folder.bytes(name, MAX_BYTES) if folder.remote else Path(path)
        if isinstance(raw, Path):
            refuse_pointer(open_file(path))
        if name in UNPARSED or not name.endswith(".json"):
            continue
        content = parse_json(read_companion(raw), path)
        if isinstance(content, dict) and AUTO_MAP in content:
            del content[AUTO_MAP]
            found[name] = as_json(content)
            notes.append(f"{path}: {AUTO_MAP} is left out, because a merge copies no code")
    code = folder.matching("*.py")
    if code:
        notes.append(f"{folder.url}: {', '.join(code)} not copied, because a merge copies no code")
    return found, notes


def read_companion(companion: Path | bytes) -> bytes:
    """Content of a companion."""
    return companion if isinstance(companion, bytes) else companion.read_bytes()


def as_json(content: Any) -> bytes:
    """JSON bytes in the layout of transformers: indented, not ASCII-escaped, with a final newline."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def adapted_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a config.json and set each key of `changes` (`vocab_size`, ...) wherever the config has that key.

    The keys are searched at the top level and in the language model's section. `auto_map` is removed. Raises
    UserError for a key that the config does not have.
    """
    if not isinstance(config, dict):
        raise UserError(f"config.json is not a JSON object: {json.dumps(config)[:80]}; write it again")
    adapted: dict[str, Any] = json.loads(json.dumps(config))
    adapted.pop(AUTO_MAP, None)
    sections = [adapted[name] for name in TEXT_SECTIONS if isinstance(adapted.get(name), dict)]
    for key, value in changes.items():
        places = [part for part in (adapted, *sections) if key in part]
        if not places:
            raise UserError(
                f"config.json has no {key}, which is {value!r} after the merge; add the key to config.json"
            )
        for part in places:
            part[key] = value
    return adapted


def read_config(companions: Mapping[str, Path | bytes]) -> dict[str, Any] | None:
    """Parsed config.json, or None if there is none."""
    content = companions.get(CONFIG)
    found = None if content is None else parse_json(read_companion(content), CONFIG)
    return found if isinstance(found, dict) else None


def with_dtype(companions: Mapping[str, Path | bytes], dtype: str | None) -> dict[str, Path | bytes]:
    """The companions with `dtype` (safetensors spelling) in config.json, under the dtype keys that it has.

    Its sections (`text_config`, ...) get it too, where they had the same dtype as the whole.
    """
    config = read_config(companions) if dtype is not None else None
    keys = [key for key in DTYPE_KEYS if config is not None and key in config]
    if config is None or dtype is None or not keys or all(config[key] == TORCH_NAMES[dtype] for key in keys):
        return dict(companions)
    before = {config[key] for key in keys if isinstance(config[key], str)}
    sections = {
        name: part | {key: TORCH_NAMES[dtype] for key in DTYPE_KEYS if part.get(key) in before}
        for name, part in config.items()
        if isinstance(part, dict)
    }
    return {**companions, CONFIG: as_json(config | sections | dict.fromkeys(keys, TORCH_NAMES[dtype]))}


def with_layers(companions: Mapping[str, Path | bytes], taken: Sequence[int]) -> dict[str, Path | bytes]:
    """The companions with a config.json for the layers `taken`, in this order: layer count and per-layer lists."""
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
