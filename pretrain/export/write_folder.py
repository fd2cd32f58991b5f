"""Trained weights as a folder that other libraries load unaided: open_clip for FLIP, transformers for LLMs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from pretrain.build.objective import load_trained, stage_tokenizer, tokenizer_name
from pretrain.merge.output.resumed_folder import new_folder
from pretrain.models.clip import clip_config, open_clip_config
from pretrain.objectives.flip import Flip
from pretrain.recipe.lengths import main_stream
from pretrain.recipe.schema import TrainStage

FORMATS = ("open_clip", "transformers")


def export(address: str, format: str, out: str | Path) -> Path:
    """Write the weights at `address` to the new folder `out`; it appears only when complete.

    `open_clip`: `open_clip.create_model_and_transforms("local-dir:OUT")` and `get_tokenizer` load it.
    `transformers`: `AutoModelForCausalLM.from_pretrained(OUT)` and `AutoTokenizer` load it; projector, image
    delimiters and the frozen tower lie beside it in `multimodal.safetensors`.
    Raises UserError for an unknown format, weights that are not of that kind, or a folder that exists.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: choose {' or '.join(FORMATS)}")
    target = Path(out)
    if target.exists():
        raise UserError(f"{target} exists already: choose another --out, or remove it")
    objective, stage = load_trained(address)
    flip = isinstance(objective, Flip)
    if flip != (format == "open_clip"):
        right = FORMATS[0] if flip else FORMATS[1]
        raise UserError(f"{address} holds a {stage.objective.kind} model: use --format {right}")
    write = _open_clip if flip else _transformers
    with new_folder(target, needed=0) as partial:
        write(objective, stage, partial)
    return target


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(
        {name: t.detach().contiguous().clone() for name, t in tensors.items()},
        path,
        metadata={"format": "pt"},
    )


def _tokenizer(stage: TrainStage, folder: Path, end: bool) -> None:
    """The tokenizer's files; `end`: whether encoding adds the end token, as a contrastive text tower wants it."""
    tokenizer = stage_tokenizer(stage)
    source = Path(tokenizer_name(stage))
    if not source.exists():  # clip-bpe: open_clip brings its own
        return
    source = source if source.is_dir() else source.parent
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    words = {entry["id"]: entry["content"] for entry in content["added_tokens"]}
    content["post_processor"] = _template(words[tokenizer.start_id], tokenizer.start_id,
                                          words[tokenizer.end_id], tokenizer.end_id, end)  # fmt: skip
    path.write_text(json.dumps(content, ensure_ascii=False))


def _template(start: str, start_id: int, end: str, end_id: int, add_end: bool) -> dict[str, Any]:
    """A TemplateProcessing step: start token, text and, if asked, end token."""
    parts = [{"SpecialToken": {"id": start, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    specials = {start: {"id": start, "ids": [start_id], "tokens": [start]}}
    if add_end:
        parts.append({"SpecialToken": {"id": end, "type_id": 0}})
        specials[end] = {"id": end, "ids": [end_id], "tokens": [end]}
    return {"type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": specials}


def _open_clip(objective: Flip, stage: TrainStage, folder: Path) -> None:
    stream = stage.data[main_stream(stage)]
    assert stream.image is not None
    assert stream.text is not None
    config = clip_config(stage.model, stream.image, stream.text, stage_tokenizer(stage))
    if Path(tokenizer_name(stage)).exists():
        # Any name makes open_clip take the tokenizer that lies in the folder; without one it takes its own BPE.
        config["text_cfg"]["hf_tokenizer_name"] = "tokenizer.json"
    content = open_clip_config(config, stream.image)
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2))
    state = objective.model.state_dict()
    # open_clip's own temperature is 0-dim and unclamped: what the forward used is what is written.
    state["logit_scale"] = state["logit_scale"].reshape(()).clamp(0, float(torch.log(torch.tensor(100.0))))
    _save(folder / "open_clip_model.safetensors", state)
    _tokenizer(stage, folder, end=True)


def _transformers(objective: Any, stage: TrainStage, folder: Path) -> None:
    llm: Any = objective.model.llm
    llm.save_pretrained(folder)
    rest = {name: t for name, t in objective.model.state_dict().items() if not name.startswith("llm.")}
    if objective.tower is not None:
        rest |= {f"vision.0.{name}": t for name, t in objective.tower.visual.state_dict().items()}
    if rest:
        _save(folder / "multimodal.safetensors", rest)
    _tokenizer(stage, folder, end=False)
