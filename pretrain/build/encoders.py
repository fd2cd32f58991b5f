"""Builds a vision encoder from an entry of `model.vision` of a recipe.

`ENCODERS` has one entry per place where an encoder comes from: a kind of address, or a scheme of `arch`. What is read
there decides the architecture; the modules are in pretrain/models/encoders/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import UserError
from pretrain.build.module_weights import load_whole, read_description, read_state
from pretrain.build.saved_stage import read_stage
from pretrain.build.tokenizer import stage_tokenizer
from pretrain.models.encoders.base import Encoder, Preprocessing
from pretrain.models.encoders.open_clip_vit import OpenClipVit
from pretrain.recipe.lengths import main_stream
from pretrain.recipe.sections.data import Stream
from pretrain.recipe.sections.model import Vision
from pretrain.run.address import locate


@dataclass(frozen=True)
class EncoderKind:
    """A kind of encoder.

    open:    (entry of model.vision, run folder) -> the encoder with its first weights, and its description: JSON data.
             On torch's meta device (a check of the model) it must not read weights
    rebuild: description -> the encoder with any weights; those of a resumed stage come from its frozen.safetensors
    trained: whether the weights of `open` are trained ones
    """

    open: Callable[[Vision, Path | None], tuple[Encoder, dict[str, Any]]]
    rebuild: Callable[[dict[str, Any]], Encoder]
    trained: bool = True


def build_encoder(
    tower: Vision, run_dir: Path | None, frozen: Path | None
) -> tuple[Encoder, dict[str, Any], bool]:
    """(encoder, description, has trained weights) for an entry of model.vision.

    If the file `frozen` exists, the stage has begun: the encoder is rebuilt from its description without weights, which
    are in that file; those at `tower.init` may have changed. Raises UserError when there is no encoder for the kind of
    address.
    """
    description = read_description(frozen) if frozen is not None else {}
    if description:
        kind = description.get("kind")
        if kind not in ENCODERS:
            raise UserError(
                f"{frozen}: its encoder is of kind {kind!r}; there are encoders for {', '.join(ENCODERS)}"
            )
        return ENCODERS[kind].rebuild(description), description, False
    kind = encoder_kind(tower, run_dir)
    encoder, description = ENCODERS[kind].open(tower, run_dir)
    return encoder, {"kind": kind, **description}, ENCODERS[kind].trained


def encoder_kind(tower: Vision, run_dir: Path | None) -> str:
    """The key in ENCODERS: `stage` or another kind of the address `init`, else the scheme of `arch` (SCHEME://NAME).

    Raises UserError if there is none.
    """
    if tower.init is not None:
        located = locate(tower.init, run_dir)
        kind: str = "stage" if located.stage_dir is not None else located.kind
        where, words = f"model.vision.init: {tower.init}", f"a {kind} address"
    elif tower.arch is not None:
        kind = tower.arch.partition("://")[0]
        where, words = f"model.vision.arch: {tower.arch}", "this architecture"
    else:
        raise UserError(
            "model.vision: write init (the address of a trained tower) or arch (SCHEME://NAME, a new one)"
        )
    if kind not in ENCODERS:
        raise UserError(
            f"{where}: no encoder can be built from {words}; there are encoders for {', '.join(ENCODERS)}"
        )
    return kind


def open_stage(tower: Vision, run_dir: Path | None) -> tuple[Encoder, dict[str, Any]]:
    """The image tower of a trained stage. Raises UserError when the stage was not trained on images."""
    from pretrain.models.clip import Clip, clip_config  # imports open_clip: seconds

    address = tower.init
    assert address is not None
    located = locate(address, run_dir)
    assert located.stage_dir is not None
    _, trained = read_stage(located.stage_dir)
    stream = trained.data[main_stream(trained)]
    if stream.image is None or stream.text is None:
        raise UserError(f"model.vision.init: {address} was not trained on images")
    config = clip_config(trained.model, stream.image, stream.text, stage_tokenizer(trained))
    clip = Clip(config)
    if torch.get_default_device().type != "meta":  # a model without numbers, for a check, needs no weights
        load_whole(clip, read_state(address, run_dir), address)
    seen = Preprocessing(stream.image.size, stream.image.mean, stream.image.std)
    return OpenClipVit(clip.visual, seen), {"clip": config, "image": asdict(seen)}


def rebuild_stage(description: dict[str, Any]) -> Encoder:
    """The image tower of a stage by its description, with new weights."""
    from pretrain.models.clip import Clip

    seen = description.get("image")
    visual = Clip(description["clip"]).visual
    return OpenClipVit(
        visual, Preprocessing(seen["size"], tuple(seen["mean"]), tuple(seen["std"])) if seen else None
    )


def check_preprocessing(encoder: Encoder, data: Mapping[str, Stream]) -> None:
    """Raise UserError for a stream whose images are not those that the encoder was trained with."""
    seen = encoder.preprocessing
    for name, stream in data.items():
        if seen is None or stream.image is None:
            continue
        image = Preprocessing(stream.image.size, stream.image.mean, stream.image.std)
        for key in ("size", "mean", "std"):
            if getattr(image, key) != getattr(seen, key):
                raise UserError(
                    f"data.{name}.image.{key} is {getattr(image, key)}, but the tower at model.vision.init was trained "
                    f"with {getattr(seen, key)}; write image: {{size: {seen.size}, mean: {list(seen.mean)}, std: "
                    f"{list(seen.std)}}}"
                )


# Kind of the address `init` (`stage`, or `Located.kind`), or scheme of `arch` -> encoder.
ENCODERS: dict[str, EncoderKind] = {"stage": EncoderKind(open_stage, rebuild_stage)}
