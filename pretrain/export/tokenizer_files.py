"""Writes the tokenizer files of an exported folder; the tokenizer adds the tokens that training added."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pretrain.build.tokenizer import stage_tokenizer, tokenizer_name
from pretrain.recipe.schema import TrainStage


def write_tokenizer(stage: TrainStage, folder: Path, end: bool) -> None:
    """Copy the stage's tokenizer files into `folder`, with a post-processor that adds the start token.

    `end`: also add the end token, as a contrastive text tower needs it. Writes nothing for clip-bpe.
    """
    tokenizer = stage_tokenizer(stage)
    source = Path(tokenizer_name(stage))
    if not source.exists():  # clip-bpe is a part of open_clip
        return
    source = source if source.is_dir() else source.parent
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    names = {entry["id"]: entry["content"] for entry in content["added_tokens"]}
    content["post_processor"] = _template(names[tokenizer.start_id], tokenizer.start_id,
                                          names[tokenizer.end_id], tokenizer.end_id, end)  # fmt: skip
    path.write_text(json.dumps(content, ensure_ascii=False))


def _template(start: str, start_id: int, end: str, end_id: int, add_end: bool) -> dict[str, Any]:
    """The TemplateProcessing step of tokenizer.json: start token, text and, with `add_end`, end token."""
    parts = [{"SpecialToken": {"id": start, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    specials = {start: {"id": start, "ids": [start_id], "tokens": [start]}}
    if add_end:
        parts.append({"SpecialToken": {"id": end, "type_id": 0}})
        specials[end] = {"id": end, "ids": [end_id], "tokens": [end]}
    return {"type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": specials}
