"""Writes a language model as a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.build.module_weights import save_tensors
from pretrain.export.tokenizer_files import write_tokenizer
from pretrain.recipe.schema import TrainStage


def write_transformers(objective: Any, stage: TrainStage, folder: Path) -> None:
    """Write the language model, its tokenizer, and all other tensors as multimodal.safetensors."""
    llm: Any = objective.model.llm
    llm.save_pretrained(folder)
    others = {name: t for name, t in objective.model.state_dict().items() if not name.startswith("llm.")}
    if objective.tower is not None:
        others |= {f"vision.0.{name}": t for name, t in objective.tower.visual.state_dict().items()}
    if others:
        save_tensors(folder / "multimodal.safetensors", others)
    write_tokenizer(stage, folder, end=False)
