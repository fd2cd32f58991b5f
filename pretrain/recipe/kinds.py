"""KINDS: the checks of each objective kind. Imports no torch, so that `dromos recipe check` starts fast."""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.recipe.data import Stream
from pretrain.recipe.schema import TrainStage
from pretrain.recipe.yaml_file import Key


def _check_pair(name: str, stream: Stream) -> Iterator[tuple[Key, str]]:
    if stream.length is not None:
        yield ("data", name, "length"), "is for packed text; a stream with images has text.length instead"
    for part in ("image", "text"):
        if getattr(stream, part) is None:
            yield ("data", name, part), "is missing; a stream of images with captions needs image and text"


def _check_flip(stage: TrainStage) -> Iterator[tuple[Key, str]]:
    if len(stage.data) > 1:
        yield (
            ("data",),
            f"flip takes exactly one stream, of images with captions; here: {', '.join(stage.data)}",
        )
    for name, stream in stage.data.items():
        yield from _check_pair(name, stream)
    if not stage.model.vision:
        yield ("model", "vision"), "is missing; flip trains a vision tower"
    if stage.model.llm is not None:
        yield ("model", "llm"), "is not used by flip; the text tower is model.text"
    if "llm" in stage.model.freeze:
        yield ("model", "freeze"), "flip has no llm; write vision or text"
    if stage.objective.weights:
        yield ("objective", "weights"), "flip has only one loss; remove the weights"


def _check_sphinx(stage: TrainStage) -> Iterator[tuple[Key, str]]:
    llm, images = stage.model.llm, False
    for name, stream in stage.data.items():
        if stream.image is not None or stream.text is not None:
            images = True
            yield from _check_pair(name, stream)
    if llm is None or (llm.init is None) == (llm.config is None):
        yield ("model", "llm"), "needs exactly one of init (an address) and config (a new model)"
    if images and not stage.model.vision:
        yield ("model", "vision"), "is missing; a stream with images needs a vision tower"
    for index, tower in enumerate(stage.model.vision or []):
        if tower.init is None:
            yield (
                ("model", "vision", str(index), "init"),
                "is missing; sphinx needs a trained vision tower",
            )
    if stage.model.text is not None:
        yield ("model", "text"), "is not used by sphinx; the language model is model.llm"
    if "text" in stage.model.freeze:
        yield ("model", "freeze"), "sphinx has no text tower; write vision or llm"
    if stage.objective.image_mask > 0:
        yield (
            ("objective", "image_mask"),
            "is not used by sphinx, which uses every patch; only flip masks patches",
        )


KINDS = {"flip": _check_flip, "sphinx": _check_sphinx}
