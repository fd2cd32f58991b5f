"""Builds the objective of a training stage: seed, tokenizer, encoder, weights.

`BUILDERS` has one function per objective kind. `build` seeds torch's generator, so the initial weights are a function
of (run seed, stage name, model) alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from data_pipeline.errors import UserError
from data_pipeline.hashing import key64
from data_pipeline.transforms.tokenizers import Tokenizer
from pretrain.build.encoders import build_encoder, check_preprocessing
from pretrain.build.freezing import apply_freeze
from pretrain.build.module_weights import load_into, read_state
from pretrain.build.saved_stage import read_stage
from pretrain.build.tokenizer import optional_tokenizer, stage_tokenizer
from pretrain.models.connectors import build_connector
from pretrain.models.encoders.base import Encoder
from pretrain.models.language_models import build_language_model
from pretrain.models.vision_language import VisionLanguageModel
from pretrain.objectives.base import Objective
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.generative import Generative
from pretrain.recipe.lengths import main_stream
from pretrain.recipe.schema import TrainStage
from pretrain.run.address import locate


@dataclass(frozen=True)
class BuildContext:
    """Arguments of a builder of an objective.

    run_dir: the run folder, where stage names in addresses are looked up; None outside a run
    frozen:  frozen.safetensors of the stage; the file may not exist
    optional_tokenizer: that of the stage, if any part of it names one
    """

    stage: TrainStage
    name: str
    seed: int
    optional_tokenizer: Tokenizer | None
    run_dir: Path | None
    frozen: Path | None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the stage. Raises UserError if there is none."""
        return self.optional_tokenizer or stage_tokenizer(self.stage)


class Built(NamedTuple):
    """A built objective.

    description: of its encoder, which is rebuilt from it; it goes into frozen.safetensors
    pretrained:  names of the parameters that have trained weights already; all others are freshly initialised
    """

    objective: Objective
    description: dict[str, Any]
    pretrained: frozenset[str]


def build(stage: TrainStage, name: str, seed: int, run_dir: Path | None, frozen: Path | None = None) -> Built:
    """The objective of stage `name` with the weights of its first step, but for `init:`; `seed` is that of the run.

    Raises UserError.
    """
    seed_weights(seed, name)
    context = BuildContext(stage, name, seed, optional_tokenizer(stage), run_dir, frozen)
    built = BUILDERS[stage.objective.kind](context)
    apply_freeze(built.objective, stage.model.freeze)
    return built


def seed_weights(seed: int, name: str) -> None:
    """Seed torch's generator for the weights of stage `name`."""
    torch.manual_seed(key64(f"{seed}/{name}/weights") & ((1 << 63) - 1))


def build_contrastive(context: BuildContext) -> Built:
    """Image and text tower, freshly initialised."""
    # Imported here, because importing open_clip takes seconds, and stages without images do not need it.
    from pretrain.models.clip import Clip, clip_config

    stage = context.stage
    stream = stage.data[main_stream(stage)]
    if stream.image is None or stream.text is None:
        raise UserError(f"data.{main_stream(stage)}: the contrastive objective needs image and text settings")
    config = clip_config(stage.model, stream.image, stream.text, context.tokenizer)
    return Built(Contrastive(Clip(config), stage), {}, frozenset())


def build_generative(context: BuildContext) -> Built:
    """A language model, with a vision encoder if the recipe has model.vision."""
    stage = context.stage
    encoder: Encoder | None = None
    connector: nn.Module | None = None
    description: dict[str, Any] = {}
    has_weights = False
    if stage.model.vision:
        seed_weights(context.seed, f"{context.name}/vision")  # not the numbers of the language model
        encoder, description, has_weights = build_encoder(
            stage.model.vision[0], context.run_dir, context.frozen
        )
        check_preprocessing(encoder, stage.data)
    # Seed again: building the encoder used random numbers, also if its weights come from another stage.
    seed_weights(context.seed, context.name)
    language_model = build_language_model(stage.model.llm, context.tokenizer)
    if encoder is not None:
        connector = build_connector(stage.model.connector, encoder.width, language_model.width)
    model = VisionLanguageModel(language_model, encoder, connector)
    vision = (name for name in model.state_dict() if name.startswith("vision."))
    return Built(Generative(model, stage), description, frozenset(vision if has_weights else ()))


BUILDERS: dict[str, Callable[[BuildContext], Built]] = {
    "contrastive": build_contrastive,
    "generative": build_generative,
}


def load_trained(address: str, run_dir: Path | None = None) -> tuple[Objective, TrainStage]:
    """The objective at an address with its trained weights, on the CPU in eval mode, and the stage that trained it.

    Raises UserError when the address is not a stage of a run.
    """
    located = locate(address, run_dir)
    if located.stage_dir is None:
        raise UserError(f"{address} is not a stage of a run; write RUN/STAGE or RUN/STAGE@STEP")
    name, stage = read_stage(located.stage_dir)
    objective = build(
        stage, name, 0, located.stage_dir.parent, located.stage_dir / "frozen.safetensors"
    ).objective
    load_into(objective.model, read_state(address, run_dir), address)
    objective.model.eval()
    return objective, stage
