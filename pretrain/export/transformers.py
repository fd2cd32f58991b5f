"""Writes a language model as a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from pretrain.build.module_weights import save_tensors
from pretrain.export.tokenizer_files import write_tokenizer
from pretrain.models.vision_language import VisionLanguageModel
from pretrain.objectives.base import Objective
from pretrain.recipe.schema import TrainStage


def write_transformers(objective: Objective, stage: TrainStage, folder: Path) -> None:
    """Write the language model, its tokenizer, and all other tensors as multimodal.safetensors."""
    # An objective whose `exports` names this format trains such a model.
    model = cast(VisionLanguageModel, objective.model)
    model.language_model.save_pretrained(folder)
    tensors = {**objective.model.state_dict(), **objective.frozen()}
    others = {name: t for name, t in tensors.items() if not name.startswith("llm.")}
    if others:
        save_tensors(folder / "multimodal.safetensors", others)
    write_tokenizer(stage, folder, end=False)
