"""Features the schema accepts but this version does not implement. Delete a row when you implement it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pretrain.recipe.kinds import KINDS
from pretrain.recipe.schema import TrainStage
from pretrain.recipe.sections.evaluation import ZeroShot
from pretrain.recipe.sections.model import Vision
from pretrain.recipe.yaml_file import Key


@dataclass(frozen=True)
class Feature:
    """A feature, the key that names it, and the test of whether a stage uses it.

    `words` completes the message "KEY: WORDS is not available yet".
    """

    key: Key
    used: Callable[[TrainStage], bool]
    words: str


def _towers(stage: TrainStage) -> list[Vision]:
    return stage.model.vision or []


UNSUPPORTED: tuple[Feature, ...] = (
    Feature(
        ("engine", "offload"), lambda s: s.engine.offload is not None, "offloading the optimizer to the CPU"
    ),
    Feature(("engine", "compile"), lambda s: s.engine.compile, "torch.compile"),
    Feature(
        ("engine", "activation_checkpointing"),
        lambda s: s.engine.activation_checkpointing,
        "recomputing activations in the backward pass",
    ),
    Feature(("model", "vision"), lambda s: len(_towers(s)) > 1, "more than one vision tower"),
    Feature(
        ("model", "vision"),
        lambda s: any(t.join == "sequence" for t in _towers(s)),
        "joining towers along the sequence",
    ),
    Feature(
        ("model", "vision"),
        lambda s: any(t.part is not None for t in _towers(s)),
        "using a part of a checkpoint as vision tower",
    ),
    Feature(
        ("model", "llm", "init"),
        lambda s: s.model.llm is not None and s.model.llm.init is not None,
        "a trained language model (write model.llm.config for a new one)",
    ),
    Feature(("model", "views"), lambda s: s.model.views is not None, "cutting an image into several views"),
    Feature(
        ("eval", "zero_shot"),
        lambda s: any(not task.classes for task in s.eval.of(ZeroShot).values()),
        "zero-shot evaluation without a list of classes (write eval.zero_shot.NAME.classes)",
    ),
)


def unsupported_features(stage: TrainStage) -> list[tuple[Key, str]]:
    """(key, words) of every unsupported feature that a training stage uses."""
    general = [(feature.key, feature.words) for feature in UNSUPPORTED if feature.used(stage)]
    general += [
        (("data", name, "text", "format"), stream.text.format)
        for name, stream in stage.data.items()
        if stream.text is not None and not stream.text.available
    ]
    return general + list(KINDS[stage.objective.kind].unsupported(stage))
