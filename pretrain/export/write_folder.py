"""`dromos export`: trained weights as a folder that another library loads: open_clip (FLIP) or transformers (LLMs)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.storage.atomic_folder import new_folder
from pretrain.build.objective import load_trained
from pretrain.export.open_clip import write_open_clip
from pretrain.export.transformers import write_transformers
from pretrain.objectives.base import Objective
from pretrain.recipe.plugins import import_plugins
from pretrain.recipe.schema import TrainStage

# `--format` -> function that writes the folder. `Objective.exports` names those that fit its model.
FORMATS: dict[str, Callable[[Objective, TrainStage, Path], None]] = {
    "open_clip": write_open_clip,
    "transformers": write_transformers,
}


def export(address: str, format: str, out: str | Path) -> Path:
    """Write the weights at `address` to the new folder `out`, which appears only when complete.

    `open_clip`: `open_clip.create_model_and_transforms("local-dir:OUT")` and `get_tokenizer` load it.
    `transformers`: `AutoModelForCausalLM.from_pretrained(OUT)` and `AutoTokenizer` load it; connector, image
    delimiters and the vision encoder are in its file `multimodal.safetensors`.
    Raises UserError for an unknown format, weights of another kind, or a folder that exists.
    """
    import_plugins()
    if format not in FORMATS:
        raise UserError(f"--format {format}: choose {' or '.join(FORMATS)}")
    target = Path(out)
    if target.exists():
        raise UserError(f"{target} already exists: choose another --out, or remove it")
    objective, stage = load_trained(address)
    if format not in objective.exports:
        valid = " or ".join(f"--format {name}" for name in objective.exports)
        use = f"use {valid}" if valid else "no format fits it"
        raise UserError(f"{address} holds a {stage.objective.kind} model: {use}")
    with new_folder(target, needed=0) as partial:
        FORMATS[format](objective, stage, partial)
    return target
