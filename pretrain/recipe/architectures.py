"""open_clip's architectures by name, and which of them pretrain/models/clip.py builds.

open_clip keeps one JSON file per architecture in its package: `embed_dim`, `vision_cfg`, `text_cfg`. They are read
without importing open_clip, which imports torch.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from pretrain.recipe.schema_errors import did_you_mean
from pretrain.recipe.sections.model import Vision

PREFIX = "open_clip://"
SUPPORTED = "open_clip's plain vision transformers, for example open_clip://ViT-B-16 or open_clip://ViT-L-14"
# Keys of an architecture that Clip builds as open_clip does.
MODEL_KEYS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"}
VISION_KEYS = {
    "image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "ls_init_value", "no_ln_pre",
    "final_ln_after_pool", "pool_type", "act_kwargs", "norm_kwargs",
}  # fmt: skip
# These follow from tokenizer and data.
TEXT_KEYS_OF_DATA = {
    "context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "pad_id", "eos_id",
}  # fmt: skip
TEXT_KEYS = TEXT_KEYS_OF_DATA | {
    "width", "heads", "layers", "mlp_ratio", "ls_init_value", "no_causal_mask", "pool_type", "proj_bias", "proj_type",
    "act_kwargs", "norm_kwargs",
}  # fmt: skip
# Scheme of `arch` (SCHEME://NAME) -> why an architecture cannot be built, or None. `ENCODERS` in
# pretrain/build/encoders.py has the same schemes; open_clip's are checked here.
OTHER_SCHEMES: dict[str, Callable[[str], str | None]] = {}
TEXT_POOLS = ("argmax", "eos", "last", "first")


def read_arch(arch: str) -> dict[str, Any] | None:
    """The content of an architecture's file; None if open_clip is not installed or has no such architecture."""
    folder = _folder()
    path = folder / f"{arch.removeprefix(PREFIX)}.json" if folder is not None else None
    return json.loads(path.read_text()) if path is not None and path.name in _names(path.parent) else None


def arch_mistake(arch: str, with_text: bool = True) -> str | None:
    """Why `model.vision.arch` cannot be built; None if it can, or if open_clip is not installed.

    `with_text`: the text tower is needed too.
    """
    scheme = arch.partition("://")[0]
    if scheme in OTHER_SCHEMES:
        return OTHER_SCHEMES[scheme](arch)
    folder = _folder()
    if folder is None:
        return None
    config = read_arch(arch)
    if config is None:
        names = [name.removesuffix(".json") for name in _names(folder)]
        close = did_you_mean(arch.removeprefix(PREFIX), names)
        return f"open_clip has no architecture {arch.removeprefix(PREFIX)!r}{close}"
    reason = _unsupported_vision(config) or (_unsupported_text(config) if with_text else None)
    return f"{arch} is not available yet: {reason}; supported are {SUPPORTED}" if reason else None


def arch_patch(tower: Vision) -> int | None:
    """Height and width of a tower's patches, in pixels: `patch`, else that of `arch`; None if neither tells."""
    known = read_arch(tower.arch) if tower.arch and tower.patch is None else None
    return known["vision_cfg"].get("patch_size") if known else tower.patch


def _unsupported_vision(config: dict[str, Any]) -> str | None:
    vision = config["vision_cfg"]
    if vision.get("timm_model_name"):
        return f"it is the timm model {vision['timm_model_name']}"
    if not isinstance(vision.get("layers", 12), int):
        return "it is a ResNet"
    others = sorted({*config} - MODEL_KEYS) + [f"vision_cfg.{key}" for key in sorted({*vision} - VISION_KEYS)]
    if vision.get("pool_type", "tok") not in ("tok", "avg"):
        others.append(f"vision_cfg.pool_type {vision['pool_type']}")
    return f"it needs {', '.join(others)}" if others else None


def _unsupported_text(config: dict[str, Any]) -> str | None:
    text = config["text_cfg"]
    if text.get("hf_model_name"):
        return f"its text tower is the transformers model {text['hf_model_name']}"
    others = [f"text_cfg.{key}" for key in sorted({*text} - TEXT_KEYS)]
    if text.get("pool_type", "argmax") not in TEXT_POOLS:
        others.append(f"text_cfg.pool_type {text['pool_type']}")
    return f"it needs {', '.join(others)}" if others else None


def _folder() -> Path | None:
    """Folder of the architectures in the installed open_clip; None if it is not installed."""
    found = importlib.util.find_spec("open_clip")  # of a package at the top: this imports nothing
    places = list(found.submodule_search_locations or []) if found is not None else []
    return Path(places[0]) / "model_configs" if places else None


@cache
def _names(folder: Path) -> frozenset[str]:
    return frozenset(path.name for path in folder.glob("*.json"))
