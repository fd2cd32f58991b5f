"""The interface of an objective kind: its section of the recipe, and what it requires of the other sections."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from pretrain.recipe.fields import Strict
from pretrain.recipe.sections.data import Stream
from pretrain.recipe.sections.model import Model
from pretrain.recipe.yaml_file import Key

Problems = Iterator[tuple[Key, str]]


class ObjectiveOptions(Strict):
    """Base of the `objective` sections of all kinds."""

    kind: str
    """What the model learns: a name in KINDS. Required."""


Options = TypeVar("Options", bound=ObjectiveOptions)


class Sections(Protocol):
    """What a kind may ask of a training stage. (`schema.TrainStage` has it; it imports the kinds.)"""

    @property
    def data(self) -> dict[str, Stream]: ...

    @property
    def model(self) -> Model: ...

    def options(self, kind: type[Options]) -> Options: ...


@dataclass(frozen=True)
class KindSpec:
    """What a recipe must know of an objective kind.

    options:     class of its `objective` section
    check:       stage -> (key, message) of each rule between sections that the stage breaks
    unsupported: stage -> (key, words) of each feature that this version does not implement, as in unsupported.py
    fields:      stage -> names of the arrays of each stream that the objective reads, by stream: `pixels` of an image,
                 and those of its text format, which must give these and no others
    predicts:    what a model of this kind can be asked for in an evaluation, see pretrain/objectives/base.py
    """

    options: type[ObjectiveOptions]
    check: Callable[[Sections], Problems]
    unsupported: Callable[[Sections], Problems]
    fields: Callable[[Sections], Mapping[str, tuple[str, ...]]]
    predicts: tuple[str, ...]
