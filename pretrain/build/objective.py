"""From a stage of a recipe to the objects that train or are evaluated: tokenizer, model, towers, objective."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.errors import UserError
from data_pipeline.hashing import key64
from data_pipeline.transforms.tokenizers import Tokenizer, load_tokenizer
from pretrain.build.module_weights import load_into, read_frozen, read_state
from pretrain.models.clip import Clip, clip_config
from pretrain.models.multimodal import Multimodal, new_llm
from pretrain.models.visual import FrozenTower
from pretrain.objectives.base import Objective
from pretrain.objectives.flip import Flip
from pretrain.objectives.sphinx import Sphinx
from pretrain.recipe.lengths import main_stream
from pretrain.recipe.schema import TrainStage, Vision
from pretrain.run.address import locate


def read_stage(stage_dir: Path) -> tuple[str, TrainStage]:
    """Run seed's stage name and the training stage that `stage_dir/resolved.yaml` describes.

    A merge stage has the shape of its first parent.
    """
    path = stage_dir / "resolved.yaml"
    if not path.exists():
        raise UserError(f"{stage_dir} holds no resolved.yaml: it is no stage of a run")
    content = yaml.safe_load(path.read_text())
    stage = content["stage"]
    if stage.get("kind") == "merge":
        parent = locate(stage.get("copy_rest") or next(iter(stage["inputs"])), stage_dir.parent)
        if parent.stage_dir is None:
            raise UserError(f"{path}: the parent {parent.path} is no stage of a run, so its model is unknown")
        return read_stage(parent.stage_dir)
    return content["name"], TrainStage.model_validate(stage)


def tokenizer_name(stage: TrainStage) -> str:
    """The one tokenizer of a stage: the language model's, else the main stream's."""
    if stage.model.llm is not None and stage.model.llm.tokenizer:
        return stage.model.llm.tokenizer
    text = stage.data[main_stream(stage)].text
    if text is None:
        raise UserError(
            "model.llm.tokenizer is missing: the stage has no stream that names a tokenizer either"
        )
    return text.tokenizer


def stage_tokenizer(stage: TrainStage) -> Tokenizer:
    """The tokenizer that `tokenizer_name` names."""
    return load_tokenizer(tokenizer_name(stage))


def build_tower(
    tower: Vision, run_dir: Path | None, frozen: Path | None
) -> tuple[FrozenTower, dict[str, Any]]:
    """A frozen tower and the description it can be built from again.

    Weights come from `frozen` (a stage's frozen.safetensors) where it exists: what an address means may have
    changed since the stage began.
    """
    tensors, described = read_frozen(frozen) if frozen is not None else ({}, {})
    if described:
        clip = Clip(described["clip"])
        own = {
            name.removeprefix("vision.0."): t for name, t in tensors.items() if name.startswith("vision.0.")
        }
        clip.visual.load_state_dict(own)
        return FrozenTower(clip.visual), described
    if tower.init is None:
        raise UserError("model.vision.init is missing: a language model's tower is trained beforehand")
    located = locate(tower.init, run_dir)
    if located.kind == "open_clip":
        raise UserError(f"model.vision.init: {tower.init}: towers from open_clip are not available yet")
    if located.stage_dir is None:
        raise UserError(
            f"model.vision.init: {tower.init} is no stage of a run; towers from elsewhere come later"
        )
    _, trained = read_stage(located.stage_dir)
    stream = trained.data[main_stream(trained)]
    if stream.image is None or stream.text is None:
        raise UserError(f"model.vision.init: {tower.init} was not trained on images")
    config = clip_config(trained.model, stream.image, stream.text, stage_tokenizer(trained))
    clip = Clip(config)
    load_into(clip, read_state(tower.init, run_dir), tower.init)
    return FrozenTower(clip.visual), {"clip": config}


def refuse_dropout(config: dict[str, Any], where: str = "model.llm.config") -> None:
    """Dropout would draw from a rank's generator, and the result would depend on the world size.

    `config` is the resolved one: some kinds of models have dropout by default.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            refuse_dropout(value, f"{where}.{key}")
        elif "drop" in str(key) and isinstance(value, int | float) and value > 0:
            raise UserError(f"{where}.{key}: {value}: dropout is not supported, set it to 0")


def check_tokens(stage: TrainStage, objective: Any, builders: Mapping[str, BatchBuilder]) -> None:
    """All text of a stage must be in the words of one tokenizer, and fit the language model's positions."""
    words = stage_tokenizer(stage)
    for name, builder in builders.items():
        used = (
            {f"data.{name}.text.tokenizer": builder.tokenizer.fingerprint}
            if builder.tokenizer is not None
            else {}
        )
        used |= {
            f"data.{name}.sources.{source} (packed with another tokenizer)": manifest.tokenizer
            for source, manifest in builder.manifests.items()
            if manifest.tokenizer
        }
        for what, fingerprint in used.items():
            if fingerprint != words.fingerprint:
                raise UserError(
                    f"{what}: its tokenizer is {fingerprint}, that of {tokenizer_name(stage)} is {words.fingerprint}; "
                    f"use one tokenizer for a stage, or pack the text again"
                )
        llm = getattr(objective.model, "llm", None)
        most = getattr(llm.config, "max_position_embeddings", None) if llm is not None else None
        seen = objective.tower.tokens + 2 if builder.spec.image is not None and llm is not None else 0
        length = (builder.spec.text.length if builder.spec.text else builder.spec.length) or 0
        if most is not None and seen + length > most:
            raise UserError(
                f"data.{name}: a row has {seen} visual and {length} text tokens, model.llm.config."
                f"max_position_embeddings is {most}; make it at least {seen + length}"
            )


def build(stage: TrainStage, name: str, seed: int, run_dir: Path | None, frozen: Path | None = None) -> Any:
    """The objective of a stage with freshly initialised weights: a function of (seed, stage name, model).

    Returns `(objective, description)`; the description goes into frozen.safetensors.
    """
    torch.manual_seed(key64(f"{seed}/{name}/weights") & ((1 << 63) - 1))
    tokenizer = stage_tokenizer(stage)
    described: dict[str, Any] = {}
    objective: Objective
    if stage.objective.kind == "flip":
        stream = stage.data[main_stream(stage)]
        if stream.image is None or stream.text is None:
            raise UserError(f"data.{main_stream(stage)}: the flip objective needs image and text settings")
        objective = Flip(Clip(clip_config(stage.model, stream.image, stream.text, tokenizer)), stage)
    else:
        llm = stage.model.llm
        if llm is None or llm.config is None:
            raise UserError("model.llm.config is missing: the sphinx objective needs a language model")
        specials = {
            "bos_token_id": tokenizer.start_id,
            "eos_token_id": tokenizer.end_id,
            "pad_token_id": tokenizer.pad_id,
        }
        tower = None
        if stage.model.vision:
            tower, described = build_tower(stage.model.vision[0], run_dir, frozen)
        torch.manual_seed(key64(f"{seed}/{name}/weights") & ((1 << 63) - 1))
        model = Multimodal(
            new_llm(llm.config, tokenizer.vocab_size, specials), tower.width if tower else None
        )
        refuse_dropout(model.llm.config.to_dict())
        objective = Sphinx(model, tower, stage)
    for part in stage.model.freeze:
        freeze(objective, part)
    return objective, described


def freeze(objective: Objective, part: str) -> None:
    """Take the parameters of `vision`, `text` or `llm` out of the training."""
    prefixes = {
        "vision": ("visual.", "vision."),
        "text": ("transformer.", "token_embedding.", "ln_final.", "positional_embedding", "text_projection"),
        "llm": ("llm.",),
    }
    if part not in prefixes:
        raise UserError(f"model.freeze: {part!r} is none of {', '.join(prefixes)}")
    for name, parameter in objective.model.named_parameters():
        if name.startswith(prefixes[part]):
            parameter.requires_grad_(False)


def load_trained(address: str, run_dir: Path | None = None) -> tuple[Any, TrainStage]:
    """The objective at an address with its trained weights, on the CPU, in eval mode; for evaluation and export."""
    located = locate(address, run_dir)
    if located.stage_dir is None:
        raise UserError(f"{address} is no stage of a run; give RUN/STAGE or RUN/STAGE@STEP")
    name, stage = read_stage(located.stage_dir)
    objective, _ = build(stage, name, 0, located.stage_dir.parent, located.stage_dir / "frozen.safetensors")
    load_into(objective.model, read_state(address, run_dir), address)
    objective.model.eval()
    return objective, stage
