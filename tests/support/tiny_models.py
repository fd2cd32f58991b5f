"""Tiny models for tests, with random weights throughout, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.models.clip import Clip, clip_config
from pretrain.models.connectors.projector import Projector
from pretrain.models.encoders.base import Encoder
from pretrain.models.language_models import causal_model
from pretrain.models.vision_language import VisionLanguageModel
from pretrain.recipe.sections.data import Image
from pretrain.recipe.sections.model import Model
from pretrain.recipe.sections.text_formats import CaptionOptions

SIZE, LENGTH, ROWS = 16, 7, 5
VISION = {"width": 16, "layers": 2, "head_width": 8, "patch": 4}
TEXT = {"width": 24, "heads": 3, "layers": 2}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


class Words:
    """Ids of a tokenizer; the end token is neither the largest id nor the padding."""

    vocab_size, start_id, end_id, pad_id, fingerprint = 11, 1, 2, 0, ""

    def encode(self, text: str) -> list[int]:
        return [3 + ord(letter) % 8 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def clip_config_of(
    vision: dict[str, Any], text: dict[str, Any] | None = None, embed: int | None = 12
) -> dict[str, Any]:
    """open_clip's config of a recipe with these keys over VISION and TEXT."""
    model = Model.model_validate({"embed": embed, "vision": VISION | vision, "text": TEXT | (text or {})})
    return clip_config(model, Image(size=SIZE), CaptionOptions(length=LENGTH), Words())


def randomise(module: torch.nn.Module) -> None:
    """Random values on top of all trained parameters: a new bias is zero, a new norm one, and would hide a mistake."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and name != "logit_scale":
                parameter.add_(torch.randn_like(parameter) * 0.3)


def clip(vision: dict[str, Any], text: dict[str, Any] | None = None) -> Clip:
    """A contrastive model in fp64."""
    torch.manual_seed(0)
    model = Clip(clip_config_of(vision, text)).double()
    randomise(model)
    return model


class Tokens(Encoder):
    """An encoder without parameters, whose images are visual tokens already, `[rows, tokens, width]`."""

    def __init__(self, width: int) -> None:
        self.module = torch.nn.Identity()
        self._width = width

    @property
    def width(self) -> int:
        return self._width

    @property
    def token_count(self) -> int:
        return 3

    def tokens(self, images: Tensor) -> Tensor:
        return self.module(images)  # type: ignore[no-any-return]


def multimodal(encoder: Encoder | None = Tokens(16), **config: Any) -> VisionLanguageModel:
    """A language model of the Llama family in fp64, with a connector unless `encoder` is None."""
    torch.manual_seed(0)
    specials = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    language_model = causal_model(LLAMA | config, 11, specials)
    connector = None if encoder is None else Projector(encoder.width, language_model.width, norm=True)
    model = VisionLanguageModel(language_model, encoder, connector).double()
    randomise(model)
    return model


def pictures(rows: int = ROWS) -> Tensor:
    """Normalised images, fp64 `[rows, 3, SIZE, SIZE]`."""
    return torch.randn(rows, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)).double()


def sentences() -> Tensor:
    """int64 `[ROWS, LENGTH]`: start, words, end, padding; rows of different lengths, the last one full."""
    rows = [[1, *[3 + (7 * row + k) % 8 for k in range(row + 1)], 2] for row in range(ROWS)]
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])
