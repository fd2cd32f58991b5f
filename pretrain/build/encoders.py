"""Builds the vision encoder of a language model from `model.vision` of a recipe.

An encoder is what the recipe calls a (vision) tower. `ENCODERS` has one function per kind of weights address; the
modules are in pretrain/models/encoders/. A new architecture also changes `rebuild_encoder` and `Generative.frozen`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.errors import UserError
from pretrain.build.module_weights import load_into, read_frozen, read_state
from pretrain.build.saved_stage import read_stage
from pretrain.build.tokenizer import stage_tokenizer
from pretrain.models.encoders.clip_tower import FrozenTower
from pretrain.recipe.lengths import main_stream
from pretrain.recipe.model import Vision
from pretrain.run.address import Located, locate


def build_encoder(
    tower: Vision, run_dir: Path | None, frozen: Path | None
) -> tuple[FrozenTower, dict[str, Any]]:
    """The vision encoder of a recipe, and the description from which it can be rebuilt.

    Its weights come from `frozen` (the stage's frozen.safetensors) if that file exists, else from `tower.init`: the
    weights at that address may have changed since the stage began. Raises UserError when there is no encoder for the
    kind of address.
    """
    tensors, description = read_frozen(frozen) if frozen is not None else ({}, {})
    if description:
        return rebuild_encoder(tensors, description), description
    if tower.init is None:
        raise UserError(
            "model.vision.init is missing: the vision tower of a language model must be trained already"
        )
    located = locate(tower.init, run_dir)
    kind = "stage" if located.stage_dir is not None else located.kind
    if kind not in ENCODERS:
        raise UserError(
            f"model.vision.init: {tower.init}: no encoder can be built from a {kind} address yet; "
            "use a stage (RUN/STAGE)"
        )
    return ENCODERS[kind](tower.init, located, run_dir)


def rebuild_encoder(tensors: dict[str, Tensor], description: dict[str, Any]) -> FrozenTower:
    """The encoder of a stage from the tensors and the description in its frozen.safetensors."""
    from pretrain.models.clip import Clip  # imports open_clip: seconds

    clip = Clip(description["clip"])
    prefix = "vision.0."
    state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    clip.visual.load_state_dict(state)
    return FrozenTower(clip.visual)


def stage_encoder(address: str, located: Located, run_dir: Path | None) -> tuple[FrozenTower, dict[str, Any]]:
    """The image tower of a trained stage. Raises UserError when the stage was not trained on images."""
    from pretrain.models.clip import Clip, clip_config

    assert located.stage_dir is not None
    _, trained = read_stage(located.stage_dir)
    stream = trained.data[main_stream(trained)]
    if stream.image is None or stream.text is None:
        raise UserError(f"model.vision.init: {address} was not trained on images")
    config = clip_config(trained.model, stream.image, stream.text, stage_tokenizer(trained))
    clip = Clip(config)
    load_into(clip, read_state(address, run_dir), address)
    return FrozenTower(clip.visual), {"clip": config}


# Kind of address (`stage`, or `Located.kind`) -> encoder with weights, and its description.
ENCODERS: dict[str, Callable[[str, Located, Path | None], tuple[FrozenTower, dict[str, Any]]]] = {
    "stage": stage_encoder,
}
