"""`dromos export`: trained weights as a folder that another library loads: open_clip (FLIP) or transformers (LLMs)."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.storage.atomic_folder import new_folder
from pretrain.build.objective import load_trained
from pretrain.export.open_clip import write_open_clip
from pretrain.export.transformers import write_transformers
from pretrain.objectives.flip import Flip

FORMATS = ("open_clip", "transformers")


def export(address: str, format: str, out: str | Path) -> Path:
    """Write the weights at `address` to the new folder `out`, which appears only when complete.

    `open_clip`: `open_clip.create_model_and_transforms("local-dir:OUT")` and `get_tokenizer` load it.
    `transformers`: `AutoModelForCausalLM.from_pretrained(OUT)` and `AutoTokenizer` load it; projector, image
    delimiters and the frozen tower are in its file `multimodal.safetensors`.
    Raises UserError for an unknown format, weights of another kind, or a folder that exists.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: choose {' or '.join(FORMATS)}")
    target = Path(out)
    if target.exists():
        raise UserError(f"{target} already exists: choose another --out, or remove it")
    objective, stage = load_trained(address)
    flip = isinstance(objective, Flip)
    if flip != (format == "open_clip"):
        valid = FORMATS[0] if flip else FORMATS[1]
        raise UserError(f"{address} holds a {stage.objective.kind} model: use --format {valid}")
    write = write_open_clip if flip else write_transformers
    with new_folder(target, needed=0) as partial:
        write(objective, stage, partial)
    return target
