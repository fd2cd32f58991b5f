"""contrastive: an image tower and a text tower learn to find each other's row in the global batch (CLIP, FLIP)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from pretrain.recipe.kinds.base import KindSpec, ObjectiveOptions, Problems, Sections


class ContrastiveOptions(ObjectiveOptions):
    """Contrastive loss of images and captions."""

    kind: Literal["contrastive"]
    """contrastive. Required."""
    image_mask: float = Field(0.0, ge=0, lt=1)
    """Fraction of an image's patches that the tower does not receive (FLIP). Default: 0."""
    text_mask: float = Field(0.0, ge=0, lt=1)
    """Fraction of a caption's tokens that are dropped (not available yet). Default: 0."""


def check(stage: Sections) -> Problems:
    """Rules of a stage with this objective."""
    if len(stage.data) > 1:
        streams = ", ".join(stage.data)
        yield ("data",), f"contrastive takes exactly one stream, of images with captions; here: {streams}"
    if stage.model.text is None and not any(tower.arch for tower in stage.model.vision or []):
        yield ("model", "text"), "is missing; write text: {width: 512, heads: 8, layers: 12}"
    for index, tower in enumerate(stage.model.vision or []):
        scheme = (tower.arch or "").rpartition("://")[0] or "open_clip"
        if scheme != "open_clip":
            yield (
                ("model", "vision", str(index), "arch"),
                "contrastive builds open_clip://ARCH, no other architecture",
            )
    if not stage.model.vision:
        yield ("model", "vision"), "is missing; contrastive trains a vision tower"
    if stage.model.connector is not None:
        yield ("model", "connector"), "is not used by contrastive; a connector is for a language model"
    if stage.model.llm is not None:
        yield ("model", "llm"), "is not used by contrastive; the text tower is model.text"
    if "llm" in stage.model.freeze:
        yield ("model", "freeze"), "contrastive has no llm; write vision or text"


def unsupported(stage: Sections) -> Problems:
    """Features of this kind that are not implemented."""
    if stage.options(ContrastiveOptions).text_mask > 0:
        yield ("objective", "text_mask"), "masking caption tokens"
    if any(tower.init for tower in stage.model.vision or []):
        yield (
            ("model", "vision"),
            "a trained vision tower in contrastive (write `init:` for the weights of the whole stage)",
        )


def fields(stage: Sections) -> Mapping[str, tuple[str, ...]]:
    """Arrays of the rows of each stream."""
    return dict.fromkeys(stage.data, ("pixels", "tokens", "used"))


SPEC = KindSpec(ContrastiveOptions, check, unsupported, fields, predicts=("embed",))
