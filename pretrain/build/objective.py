"""Builds the objective of a training stage: seed, tokenizer, frozen tower, weights, freezing.

`BUILDERS` has one function per objective kind. `build` seeds torch's generator, so the initial weights are a function
of (run seed, stage name, model) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from pretrain.run.address import locate, model_stage

# Name prefixes of the parameters that `model.freeze` names.
FREEZABLE = {
    "vision": ("visual.", "vision."),
    "text": ("transformer.", "token_embedding.", "ln_final.", "positional_embedding", "text_projection"),
    "llm": ("llm.",),
}


@dataclass(frozen=True)
class BuildContext:
    """Arguments of a builder of an objective.

    run_dir: the run folder, where stage names in addresses are looked up; None outside a run
    frozen:  frozen.safetensors of the stage; the file may not exist
    """

    stage: TrainStage
    name: str
    seed: int
    tokenizer: Tokenizer
    run_dir: Path | None
    frozen: Path | None


def build(
    stage: TrainStage, name: str, seed: int, run_dir: Path | None, frozen: Path | None = None
) -> tuple[Objective, dict[str, Any]]:
    """The objective of stage `name` with freshly initialised weights; `seed` is that of the run.

    Returns `(objective, description)`. The description goes into frozen.safetensors, and the frozen tower is rebuilt
    from it. Raises UserError.
    """
    seed_weights(seed, name)
    context = BuildContext(stage, name, seed, stage_tokenizer(stage), run_dir, frozen)
    objective, description = BUILDERS[stage.objective.kind](context)
    for part in stage.model.freeze:
        freeze(objective, part)
    return objective, description


def seed_weights(seed: int, name: str) -> None:
    """Seed torch's generator for the weights of stage `name`."""
    torch.manual_seed(key64(f"{seed}/{name}/weights") & ((1 << 63) - 1))


def build_flip(context: BuildContext) -> tuple[Objective, dict[str, Any]]:
    """FLIP: both towers are trained, so there is no frozen tower to describe."""
    stage = context.stage
    stream = stage.data[main_stream(stage)]
    if stream.image is None or stream.text is None:
        raise UserError(f"data.{main_stream(stage)}: the flip objective needs image and text settings")
    config = clip_config(stage.model, stream.image, stream.text, context.tokenizer)
    return Flip(Clip(config), stage), {}


def build_sphinx(context: BuildContext) -> tuple[Objective, dict[str, Any]]:
    """SPHINX: a language model, with a frozen tower if the recipe has model.vision."""
    stage, tokenizer = context.stage, context.tokenizer
    llm = stage.model.llm
    if llm is None or llm.config is None:
        raise UserError("model.llm.config is missing: the sphinx objective needs a language model")
    special_tokens = {
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": tokenizer.end_id,
        "pad_token_id": tokenizer.pad_id,
    }
    tower: FrozenTower | None = None
    description: dict[str, Any] = {}
    if stage.model.vision:
        tower, description = build_tower(stage.model.vision[0], context.run_dir, context.frozen)
    # Seed again: building the tower used random numbers, although its weights come from another stage.
    seed_weights(context.seed, context.name)
    model = Multimodal(
        new_llm(llm.config, tokenizer.vocab_size, special_tokens), tower.width if tower else None
    )
    refuse_dropout(model.llm.config.to_dict())
    return Sphinx(model, tower, stage), description


BUILDERS: dict[str, Callable[[BuildContext], tuple[Objective, dict[str, Any]]]] = {
    "flip": build_flip,
    "sphinx": build_sphinx,
}


def build_tower(
    tower: Vision, run_dir: Path | None, frozen: Path | None
) -> tuple[FrozenTower, dict[str, Any]]:
    """A frozen tower, and the description from which it can be rebuilt.

    Its weights come from `frozen` (the stage's frozen.safetensors) if that file exists, else from `tower.init`: the
    weights at that address may have changed since the stage began. Raises UserError when the address is not a stage
    that was trained on images.
    """
    tensors, description = read_frozen(frozen) if frozen is not None else ({}, {})
    if description:
        clip = Clip(description["clip"])
        prefix = "vision.0."
        state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        clip.visual.load_state_dict(state)
        return FrozenTower(clip.visual), description
    if tower.init is None:
        raise UserError(
            "model.vision.init is missing: the vision tower of a language model must be trained already"
        )
    located = locate(tower.init, run_dir)
    if located.kind == "open_clip":
        raise UserError(f"model.vision.init: {tower.init}: towers from open_clip are not available yet")
    if located.stage_dir is None:
        raise UserError(
            f"model.vision.init: {tower.init} is not a stage of a run; other towers are not available yet"
        )
    _, trained = read_stage(located.stage_dir)
    stream = trained.data[main_stream(trained)]
    if stream.image is None or stream.text is None:
        raise UserError(f"model.vision.init: {tower.init} was not trained on images")
    config = clip_config(trained.model, stream.image, stream.text, stage_tokenizer(trained))
    clip = Clip(config)
    load_into(clip, read_state(tower.init, run_dir), tower.init)
    return FrozenTower(clip.visual), {"clip": config}


def freeze(objective: Objective, part: str) -> None:
    """Exclude the parameters of `part` (a key of FREEZABLE) from training. Raises UserError for another part."""
    if part not in FREEZABLE:
        raise UserError(f"model.freeze: {part!r} is none of {', '.join(FREEZABLE)}")
    for name, parameter in objective.model.named_parameters():
        if name.startswith(FREEZABLE[part]):
            parameter.requires_grad_(False)


def load_trained(address: str, run_dir: Path | None = None) -> tuple[Any, TrainStage]:
    """The objective at an address with its trained weights, on the CPU in eval mode, and the stage that trained it.

    For evaluation and export, which use attributes of the concrete objective: hence `Any`. Raises UserError when the
    address is not a stage of a run.
    """
    located = locate(address, run_dir)
    if located.stage_dir is None:
        raise UserError(f"{address} is not a stage of a run; write RUN/STAGE or RUN/STAGE@STEP")
    name, stage = read_stage(located.stage_dir)
    objective, _ = build(stage, name, 0, located.stage_dir.parent, located.stage_dir / "frozen.safetensors")
    load_into(objective.model, read_state(address, run_dir), address)
    objective.model.eval()
    return objective, stage


def read_stage(stage_dir: Path) -> tuple[str, TrainStage]:
    """Name and recipe of the training stage that defines the model of the weights in `stage_dir`.

    For a merge stage: the stage of `copy_rest`, else of its first input (`model_stage`). Raises UserError when there is
    none.
    """
    folder = model_stage(stage_dir)
    if folder is None:
        raise UserError(
            f"{stage_dir}: its model is unknown: resolved.yaml is missing there, or a stage that it was merged from "
            "is not a stage of a run"
        )
    record = yaml.safe_load((folder / "resolved.yaml").read_text())
    return record["name"], TrainStage.model_validate(record["stage"])


def tokenizer_name(stage: TrainStage) -> str:
    """The tokenizer of a stage: that of the language model, else that of the main stream. Raises UserError."""
    if stage.model.llm is not None and stage.model.llm.tokenizer:
        return stage.model.llm.tokenizer
    text = stage.data[main_stream(stage)].text
    if text is None:
        raise UserError("model.llm.tokenizer is missing, and no stream of the stage has a tokenizer either")
    return text.tokenizer


def stage_tokenizer(stage: TrainStage) -> Tokenizer:
    """The tokenizer that `tokenizer_name` names."""
    return load_tokenizer(tokenizer_name(stage))


def check_tokens(stage: TrainStage, objective: Objective, builders: Mapping[str, BatchBuilder]) -> None:
    """Raise UserError unless all streams use the stage's tokenizer and their rows fit into the language model."""
    tokenizer = stage_tokenizer(stage)
    for name, builder in builders.items():
        _check_tokenizer(name, builder, tokenizer.fingerprint, tokenizer_name(stage))
        _check_row_length(name, builder, objective)


def _check_tokenizer(name: str, builder: BatchBuilder, fingerprint: str, tokenizer: str) -> None:
    """Compare the tokenizers of a stream, and of its packed sources, with the stage's."""
    used: dict[str, str] = {}
    if builder.tokenizer is not None:
        used[f"data.{name}.text.tokenizer"] = builder.tokenizer.fingerprint
    used |= {
        f"data.{name}.sources.{source} (packed with another tokenizer)": manifest.tokenizer
        for source, manifest in builder.manifests.items()
        if manifest.tokenizer
    }
    for where, other in used.items():
        if other != fingerprint:
            raise UserError(
                f"{where}: its tokenizer is {other}, that of {tokenizer} is {fingerprint}; "
                f"use one tokenizer for the whole stage, or pack the text again"
            )


def _check_row_length(name: str, builder: BatchBuilder, objective: Objective) -> None:
    """Compare the longest row of a stream, visual tokens included, with max_position_embeddings."""
    llm = getattr(objective.model, "llm", None)
    limit = getattr(llm.config, "max_position_embeddings", None) if llm is not None else None
    if limit is None:
        return
    tower = getattr(objective, "tower", None)
    visual = (
        tower.token_count + 2 if tower is not None and builder.spec.image is not None else 0
    )  # 2 delimiters
    text = (builder.spec.text.length if builder.spec.text else builder.spec.length) or 0
    if visual + text > limit:
        raise UserError(
            f"data.{name}: a row has {visual} visual and {text} text tokens, model.llm.config."
            f"max_position_embeddings is {limit}; make it at least {visual + text}"
        )


def refuse_dropout(config: dict[str, Any], where: str = "model.llm.config") -> None:
    """Raise UserError for dropout, which draws from a rank's generator: results would depend on the world size.

    `config` is the resolved one, because some model types have dropout by default.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            refuse_dropout(value, f"{where}.{key}")
        elif "drop" in str(key) and isinstance(value, int | float) and value > 0:
            raise UserError(f"{where}.{key}: {value}: dropout is not supported, set it to 0")
