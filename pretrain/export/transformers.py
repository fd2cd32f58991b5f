"""A folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.export.tokenizer_files import save_tensors, write_tokenizer
from pretrain.recipe.schema import TrainStage


def write_transformers(objective: Any, stage: TrainStage, folder: Path) -> None:
    llm: Any = objective.model.llm
    llm.save_pretrained(folder)
    rest = {name: t for name, t in objective.model.state_dict().items() if not name.startswith("llm.")}
    if objective.tower is not None:
        rest |= {f"vision.0.{name}": t for name, t in objective.tower.visual.state_dict().items()}
    if rest:
        save_tensors(folder / "multimodal.safetensors", rest)
    write_tokenizer(stage, folder, end=False)
