"""Two-tower contrastive models: open_clip's towers with the patch mask as an argument, and their config."""

from __future__ import annotations

import math
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.errors import UserError
from data_pipeline.transforms.tokenizers import Tokenizer
from pretrain.recipe.architectures import TEXT_KEYS_OF_DATA, arch_mistake, read_arch
from pretrain.recipe.sections.data import Image
from pretrain.recipe.sections.model import Model, TextTower, Vision
from pretrain.recipe.sections.text_formats import TextOptions

MAX_SCALE = 100.0  # upper limit of the logit scale in the forward, as in FLIP and CLIP


class KeptPatches(nn.Module):
    """Replaces open_clip's random patch dropout: keeps the class token and the patches in `keep`.

    It runs after position embeddings are added, as in FLIP, so the transformer processes only the kept tokens.
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
    """open_clip's CLIP with the patch mask as an argument and the logit scale clamped inside the forward.

    `logit_scale` has shape [1] during training, because DeepSpeed cannot broadcast a 0-dim parameter.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(**config, output_dict=True)
        self.visual.patch_dropout = KeptPatches()
        scale = dict(self.named_parameters())["logit_scale"]
        self.logit_scale = nn.Parameter(scale.detach().reshape(1))

    @property
    def patches(self) -> int:
        """Number of patches per image."""
        grid = self.visual.grid_size
        return grid[0] * grid[1]

    def forward(
        self, images: Tensor | None = None, tokens: Tensor | None = None, keep: Tensor | None = None
    ) -> dict[str, Tensor]:
        """L2-normalised features `image` and `text` `[rows, embed]`, and fp32 `scale` `[1]`, between 1 and 100.

        `images`: float `[rows, 3, size, size]`, normalised. `tokens`: int64 `[rows, length]`. `keep`: int64
        `[rows, kept]`, indices of the patches that the tower receives; None: all. Without `images` or `tokens`, that
        feature is absent.
        """
        # In fp32: bf16 has no number between 4.594 and 4.625, so the largest scale would be 99.
        out = {"scale": self.logit_scale.float().clamp(0, math.log(MAX_SCALE)).exp()}
        if images is not None:
            self.visual.patch_dropout.keep = keep
            out["image"] = F.normalize(self.visual(images.to(self.visual.conv1.weight.dtype)), dim=-1)
            self.visual.patch_dropout.keep = None
        if tokens is not None:
            out["text"] = self.encode_text(tokens, normalize=True)
        return out


def vision_config(tower: Vision, image_size: int) -> dict[str, Any]:
    """open_clip's `vision_cfg` of a recipe's vision tower: that of `arch`, changed by the keys that are written.

    `image_size` is in pixels. Raises UserError for an `arch` that `Clip` does not build, missing sizes, or a patch that
    does not divide the image.
    """
    config = dict(_arch(tower).get("vision_cfg", {}))
    written = {
        "width": tower.width,
        "layers": tower.layers,
        "patch_size": tower.patch,
        "pool_type": tower.pool,
        "pos_embed_type": "sin_cos_2d" if tower.positions == "sincos" else None,
    }
    config |= {key: value for key, value in written.items() if value is not None}
    if not tower.arch:
        missing = [k for k in ("width", "layers", "patch_size") if k not in config]
        if missing:
            raise UserError(
                f"model.vision: write arch, or width, layers and patch (missing: {', '.join(missing)})"
            )
        config.setdefault("pool_type", "tok")
        config |= {"head_width": tower.head_width or 64, "mlp_ratio": tower.mlp_ratio or 4.0}
    if image_size % int(config.get("patch_size", 16)):
        raise UserError(
            f"model.vision.patch {config['patch_size']} does not divide the image size {image_size}"
        )
    config["image_size"] = image_size
    return config


def text_config(
    tower: TextTower, arch: dict[str, Any], text: TextOptions, tokenizer: Tokenizer
) -> dict[str, Any]:
    """open_clip's `text_cfg`: that of `arch`, the content of an architecture's file, changed by the keys that are
    written. Without an architecture `arch` is empty.
    """
    config = {"width": 512, "heads": 8, "layers": 12, "no_causal_mask": False}
    known = arch.get("text_cfg", {})
    config |= {key: value for key, value in known.items() if key not in TEXT_KEYS_OF_DATA}
    written = {
        "width": tower.width,
        "heads": tower.heads,
        "layers": tower.layers,
        "no_causal_mask": None if tower.causal is None else not tower.causal,
    }
    config |= {key: value for key, value in written.items() if value is not None}
    # argmax: the end token, which has the largest id in CLIP's vocabulary; not in that of another tokenizer.
    pool = known.get("pool_type", "argmax")
    return config | {
        "context_length": text.length,
        "vocab_size": tokenizer.vocab_size,
        "pad_id": tokenizer.pad_id,
        "pool_type": "eos" if pool == "argmax" else pool,
        "eos_id": tokenizer.end_id,
    }


def clip_config(model: Model, image: Image, text: TextOptions, tokenizer: Tokenizer) -> dict[str, Any]:
    """open_clip's `model_cfg` of a recipe's `model` section."""
    if not model.vision or len(model.vision) != 1 or (model.text is None and not model.vision[0].arch):
        raise UserError(
            "model: the contrastive objective needs one vision tower and `text: {width, heads, layers}`"
        )
    arch = _arch(model.vision[0])
    text_cfg = text_config(model.text or TextTower(), arch, text, tokenizer)
    config = {
        "embed_dim": model.embed or arch.get("embed_dim") or text_cfg["width"],
        "vision_cfg": vision_config(model.vision[0], image.size),
        "text_cfg": text_cfg,
    }
    return config | ({"quick_gelu": True} if arch.get("quick_gelu") else {})


def _arch(tower: Vision) -> dict[str, Any]:
    """The content of the file of `tower.arch`; empty without one. Raises UserError if `Clip` does not build it."""
    if not tower.arch:
        return {}
    if mistake := arch_mistake(tower.arch):
        raise UserError(f"model.vision.arch: {mistake}")
    return read_arch(tower.arch) or {}


def open_clip_config(config: dict[str, Any], image: Image) -> dict[str, Any]:
    """The content of `open_clip_config.json` for an exported folder."""
    preprocessing = {
        "mean": list(image.mean),
        "std": list(image.std),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    return {"model_cfg": config, "preprocess_cfg": {"size": image.size, "mode": "RGB", **preprocessing}}
