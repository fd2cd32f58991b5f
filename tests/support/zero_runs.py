"""Finished training stages for tests, with checkpoints in DeepSpeed's ZeRO-0 layout, written by torch.save."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from pretrain.recipe.dump import dump_plain, stage_record
from pretrain.recipe.kinds.contrastive import ContrastiveOptions
from pretrain.recipe.schema import MergeStage, Recipe, Run, Train, TrainStage


def training(name: str = "flip") -> TrainStage:
    return TrainStage(objective=ContrastiveOptions(kind="contrastive"), train=Train(steps=1))


def recipe(run_dir: Path, **stages: TrainStage | MergeStage) -> Recipe:
    return Recipe(run=Run(name="r", dir=str(run_dir)), stages=stages)


def finish(
    made: Recipe,
    name: str,
    run_dir: Path,
    tensors: dict[str, np.ndarray],
    frozen: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write `run_dir/name` as a training of one step does."""
    import torch

    stage = run_dir / name
    step = stage / "checkpoints/step_00000001"
    step.mkdir(parents=True)
    module = {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}
    torch.save({"module": module, "buffer_names": [], "optimizer": None}, step / "mp_rank_00_model_states.pt")
    (step / "manifest.json").write_text(
        json.dumps({"mp_rank_00_model_states.pt": {"xxh64": "0" * 16, "size": 0}})
    )
    (step / "COMPLETE").write_text("")
    (run_dir / "recipe.yaml").write_text("")
    (stage / "resolved.yaml").write_text(dump_plain(stage_record(made, name)))
    (stage / "result.json").write_text(json.dumps({"step": 1, "eval": {}}))
    if frozen:
        save_file(frozen, stage / "frozen.safetensors", metadata={"format": "pt", "towers": "{}"})
    return stage
