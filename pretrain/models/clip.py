"""open_clip's two towers with patches chosen outside: what a recipe's `model` section becomes, and its config file."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.errors import UserError
from data_pipeline.transforms.tokenizers import Tokenizer
from pretrain.recipe.data import Image, Text
from pretrain.recipe.schema import Model, Vision

MAX_SCALE = 100.0


class KeptPatches(nn.Module):
    """Stands where open_clip drops patches at random: keeps those it is told to, and the class token.

    Positions are already added, as in FLIP: the tower only ever sees the kept tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.keep: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, 1 + patches, width]` -> `[rows, 1 + kept, width]`."""
        if self.keep is None:
            return x
        index = self.keep[:, :, None].expand(-1, -1, x.shape[2])
        return torch.cat([x[:, :1], x[:, 1:].gather(1, index)], dim=1)


class Clip(open_clip.CLIP):
    """open_clip's CLIP with masks as an argument and the temperature clamped inside the forward.

    `logit_scale` has shape [1] while it trains: DeepSpeed cannot broadcast a 0-dim parameter.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(**config, output_dict=True)
        self.visual.patch_dropout = KeptPatches()
        scale = dict(self.named_parameters())["logit_scale"]
        self.logit_scale = nn.Parameter(scale.detach().reshape(1))

    @property
    def patches(self) -> int:
        grid = self.visual.grid_size
        return grid[0] * grid[1]

    def forward(
        self, images: Tensor | None = None, tokens: Tensor | None = None, keep: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Normalised features and the scale, 1..100, as FLIP clips it.

        `images`: float `[rows, 3, size, size]`, normalised. `tokens`: int64 `[rows, length]`. `keep`: int64
        `[rows, kept]`, the patches that the tower sees; None: all. Returns `image` and `text` `[rows, embed]` and
        `scale` [1].
        """
        out = {"scale": self.logit_scale.clamp(0, torch.log(torch.tensor(MAX_SCALE)).item()).exp()}
        if images is not None:
            self.visual.patch_dropout.keep = keep
            out["image"] = F.normalize(self.visual(images.to(self.visual.conv1.weight.dtype)), dim=-1)
            self.visual.patch_dropout.keep = None
        if tokens is not None:
            out["text"] = self.encode_text(tokens, normalize=True)
        return out


def vision_config(tower: Vision, image_size: int) -> dict[str, Any]:
    """The recipe's tower as open_clip's `vision_cfg`."""
    config: dict[str, Any] = {}
    if tower.arch:
        name = tower.arch.removeprefix("open_clip://")
        known = open_clip.get_model_config(name)
        if known is None:
            raise UserError(f"model.vision.arch: open_clip knows no {name!r}; see open_clip.list_models()")
        config = dict(known["vision_cfg"])
    for key, value in (("width", tower.width), ("layers", tower.layers), ("patch_size", tower.patch)):
        if value is not None:
            config[key] = value
    if not tower.arch:
        missing = [k for k in ("width", "layers", "patch_size") if k not in config]
        if missing:
            raise UserError(
                f"model.vision: write arch, or width, layers and patch (missing: {', '.join(missing)})"
            )
        config["head_width"] = tower.head_width
        config["mlp_ratio"] = tower.mlp_ratio
    if image_size % int(config.get("patch_size", 16)):
        raise UserError(
            f"model.vision.patch {config['patch_size']} does not divide the image size {image_size}"
        )
    config["image_size"] = image_size
    config["pool_type"] = tower.pool
    if tower.positions == "sincos":
        config["pos_embed_type"] = "sin_cos_2d"
    return config


def clip_config(model: Model, image: Image, text: Text, tokenizer: Tokenizer) -> dict[str, Any]:
    """The `model_cfg` of open_clip for a recipe's `model` section."""
    if not model.vision or len(model.vision) != 1 or model.text is None:
        raise UserError("model: the flip objective needs one vision tower and `text: {width, heads, layers}`")
    tower, words = model.vision[0], model.text
    embed = model.embed
    if embed is None and tower.arch:
        known = open_clip.get_model_config(tower.arch.removeprefix("open_clip://"))
        embed = known["embed_dim"] if known else None
    return {
        "embed_dim": embed or words.width,
        "vision_cfg": vision_config(tower, image.size),
        "text_cfg": {
            "context_length": text.length,
            "vocab_size": tokenizer.vocab_size,
            "width": words.width,
            "heads": words.heads,
            "layers": words.layers,
            "no_causal_mask": not words.causal,
            "pad_id": tokenizer.pad_id,
            "pool_type": "eos",
            "eos_id": tokenizer.end_id,
        },
    }


def open_clip_config(config: dict[str, Any], image: Image) -> dict[str, Any]:
    """The content of `open_clip_config.json` for an exported folder."""
    shown = {
        "mean": list(image.mean),
        "std": list(image.std),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    return {"model_cfg": config, "preprocess_cfg": {"size": image.size, "mode": "RGB", **shown}}
