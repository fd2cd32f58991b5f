"""Writes a contrastive model as a folder that open_clip loads."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pretrain.build.module_weights import save_tensors
from pretrain.build.tokenizer import stage_tokenizer, tokenizer_name
from pretrain.export.tokenizer_files import write_tokenizer
from pretrain.models.clip import clip_config, open_clip_config
from pretrain.objectives.base import Objective
from pretrain.recipe.lengths import main_stream
from pretrain.recipe.schema import TrainStage


def write_open_clip(objective: Objective, stage: TrainStage, folder: Path) -> None:
    """Write open_clip_config.json, open_clip_model.safetensors and tokenizer files into `folder`."""
    stream = stage.data[main_stream(stage)]
    assert stream.image is not None
    assert stream.text is not None
    config = clip_config(stage.model, stream.image, stream.text, stage_tokenizer(stage))
    if Path(tokenizer_name(stage)).exists():
        # With any name, open_clip loads the tokenizer in the folder; without a name it uses its own BPE.
        config["text_cfg"]["hf_tokenizer_name"] = "tokenizer.json"
    content = open_clip_config(config, stream.image)
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2))
    state = objective.model.state_dict()
    # open_clip's logit scale is 0-dim and not clamped in its forward, so the clamped value is written.
    state["logit_scale"] = state["logit_scale"].reshape(()).clamp(0, float(torch.log(torch.tensor(100.0))))
    save_tensors(folder / "open_clip_model.safetensors", state)
    write_tokenizer(stage, folder, end=True)
