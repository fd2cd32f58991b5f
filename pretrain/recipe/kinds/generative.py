"""generative: a language model learns the next token of text and of captions after their images (SPHINX)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pretrain.recipe.kinds.base import KindSpec, ObjectiveOptions, Problems, Sections
from pretrain.recipe.sections.data import Stream


class GenerativeOptions(ObjectiveOptions):
    """Next-token loss of a language model."""

    kind: Literal["generative"]
    """generative. Required."""
    weights: dict[str, float] | None = None
    """Stream name -> factor on the stream's loss (a mean per token). Default: 1 for each stream."""


# Addresses of weights from which no encoder is built yet.
ELSEWHERE = ("hf", "open_clip", "s3", "http", "https")


def check(stage: Sections) -> Problems:
    """Rules of a stage with this objective."""
    llm, images = stage.model.llm, any(_has_images(stream) for stream in stage.data.values())
    if llm is None or (llm.init is None) == (llm.config is None):
        yield ("model", "llm"), "needs exactly one of init (an address) and config (a new model)"
    if images and not stage.model.vision:
        yield ("model", "vision"), "is missing; a stream with images needs a vision tower"
    if stage.model.vision and stage.model.connector is None:
        yield ("model", "connector"), "is missing; write connector: {kind: linear, norm: true}"
    for index, tower in enumerate(stage.model.vision or []):
        if tower.init is None and tower.arch is None:
            key = ("model", "vision", str(index))
            yield key, "needs init, the address of a trained tower"
    if stage.model.text is not None:
        yield ("model", "text"), "is not used by generative; the language model is model.llm"
    if "text" in stage.model.freeze:
        yield ("model", "freeze"), "generative has no text tower; write vision or llm"
    weights = stage.options(GenerativeOptions).weights or {}
    for name in weights:
        if name not in stage.data:
            yield (
                ("objective", "weights", name),
                f"is not a stream of this stage; it has {', '.join(stage.data)}",
            )


def unsupported(stage: Sections) -> Problems:
    """Features of this kind that are not implemented."""
    towers = stage.model.vision or []
    new_clip = [
        tower for tower in towers if tower.init is None and (tower.arch or "").startswith("open_clip://")
    ]
    elsewhere = [tower for tower in towers if (tower.init or "").partition("://")[0] in ELSEWHERE]
    if new_clip or elsewhere:
        words = "a vision tower that was not trained by a dromos run (write model.vision.init: RUN/STAGE)"
        yield ("model", "vision"), words
    if towers and "vision" not in stage.model.freeze:
        yield ("model", "freeze"), "training the vision tower (write model.freeze: [vision])"
    if any(stream.image is None and stream.text is None for stream in stage.data.values()):
        yield (
            ("data",),
            "a stream whose image size and tokenizer follow from the model (write data.STREAM.image and .text)",
        )


def fields(stage: Sections) -> Mapping[str, tuple[str, ...]]:
    """Arrays of the rows of each stream; none for one whose image size and tokenizer follow from the model."""
    return {
        name: ("pixels", "tokens", "used") if _has_images(stream) else ("tokens", "used")
        for name, stream in stage.data.items()
        if stream.image is not None or stream.text is not None
    }


def _has_images(stream: Stream) -> bool:
    """Whether a stream has images, or should have them because of its text."""
    return stream.image is not None or (stream.text is not None and stream.text.images == "needed")


SPEC = KindSpec(GenerativeOptions, check, unsupported, fields, predicts=("nll", "generate"))
