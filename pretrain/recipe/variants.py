"""The sections of a training stage whose keys depend on one of their own, such as `objective` on its `kind`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pretrain.recipe.fields import Strict
from pretrain.recipe.kinds import KINDS
from pretrain.recipe.kinds.base import ObjectiveOptions
from pretrain.recipe.sections.model import CONNECTOR_KINDS, ConnectorOptions
from pretrain.recipe.sections.text_formats import TEXT_FORMATS, TextOptions
from pretrain.recipe.yaml_file import Key


@dataclass(frozen=True)
class Variants:
    """One such section.

    base:     class of the section in the schema
    path:     its key; `*` stands for any name
    selector: the key that decides
    default:  its value if it is absent
    classes:  value of the selector -> class of the section
    """

    base: type[Strict]
    path: Key
    selector: str
    default: str | None
    classes: Callable[[], Mapping[str, type[Strict]]]

    def is_at(self, key: Key) -> bool:
        """Whether `key` is the section's."""
        return len(key) == len(self.path) and all(
            mine in ("*", other) for mine, other in zip(self.path, key, strict=True)
        )

    def having(self, key: str) -> list[str]:
        """The values of the selector under which the section has a key of this name."""
        return [name for name, variant in self.classes().items() if key in key_names(variant)]


VARIANTS = (
    Variants(
        ObjectiveOptions,
        ("objective",),
        "kind",
        None,
        lambda: {name: spec.options for name, spec in KINDS.items()},
    ),
    Variants(TextOptions, ("data", "*", "text"), "format", "caption", lambda: TEXT_FORMATS),
    Variants(ConnectorOptions, ("model", "connector"), "kind", "linear", lambda: CONNECTOR_KINDS),
)


def variants_at(key: Key) -> Variants | None:
    """The variants of the section at `key`; None for any other section."""
    return next((variants for variants in VARIANTS if variants.is_at(key)), None)


def variants_of(section: type) -> Variants | None:
    """The variants of the section whose class in the schema is `section`; None for any other."""
    return next((variants for variants in VARIANTS if variants.base is section), None)


def key_names(section: type[Strict]) -> list[str]:
    """The keys of a section as they are written in a recipe."""
    return [info.alias or name for name, info in section.model_fields.items()]
