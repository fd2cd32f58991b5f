"""`TEXT_FORMATS`: the `data.STREAM.text` section of a recipe, one class of keys per format.

Imports no numpy, so that `dromos recipe check` starts fast. A new format is a TextFormat of
data_pipeline/transforms/text_formats.py, a class here, and a line in TEXT_FORMATS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from data_pipeline.errors import UserError
from data_pipeline.transforms.captions import CaptionSpec
from pretrain.recipe.fields import Strict, parse_variant

if TYPE_CHECKING:
    from data_pipeline.transforms.text_formats import TextFormat


class TextOptions(Strict):
    """From the text of a sample to named arrays."""

    available: ClassVar[bool] = True
    """False for a format that recipes may name but this version does not have."""
    arrays: ClassVar[tuple[str, ...]] = ("tokens", "used")
    """Names of the arrays that the format gives to a row."""
    images: ClassVar[Literal["needed", "allowed", "none"]] = "needed"
    """Whether a stream with this text has images."""

    format: str = "caption"
    """How a sample becomes tokens: a name in TEXT_FORMATS. Default: caption."""
    length: int
    """Tokens per row. Required."""

    @property
    def tokenizer_name(self) -> str | None:
        """Name or path of the tokenizer; None for text that was tokenised beforehand."""
        return None

    def row_format(self) -> TextFormat:
        """The format that workers use. Raises UserError if it is not available."""
        raise UserError(f"text.format: {self.format} is not available yet")


class Captions(Strict):
    """Candidate captions of a sample; each time the sample is read, one of them is drawn."""

    from_: list[str] = Field(alias="from")
    """Members with one caption or a list of captions: txt, json.caption, json.all_captions. Required."""
    scores: list[str | None] = Field(default_factory=list)
    """For each entry of `from`, the json.FIELD with its scores, or null. Default: no scores."""
    top: int | None = Field(None, ge=1)
    """Number of candidates: those with the highest scores, or the first ones without scores. Default: all."""

    @model_validator(mode="after")
    def _fits(self) -> Captions:
        self.spec()  # raises UserError for a contradiction
        return self

    def spec(self) -> CaptionSpec:
        """The same for workers."""
        return CaptionSpec(tuple(self.from_), tuple(self.scores), self.top)


class CaptionOptions(TextOptions):
    """One caption per sample."""

    format: Literal["caption"] = "caption"
    """caption. Default: caption."""
    tokenizer: str = "clip-bpe"
    """`clip-bpe`, or the path of a tokenizer.json or of the folder that holds it. Default: clip-bpe."""
    length: int = Field(32, gt=2)
    """Tokens per row: start token, caption, end token, padding. Longer captions are cut. Default: 32."""
    captions: Captions | None = None
    """Where captions are. Default: the member txt, else the first caption field of the member json."""

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer

    def row_format(self) -> TextFormat:
        from data_pipeline.transforms.text_formats import CaptionFormat  # imports numpy

        return CaptionFormat(self.tokenizer, self.length, self.captions.spec() if self.captions else None)


class PackedOptions(TextOptions):
    """Sequences of tokens that data_pipeline.prepare.pack or another tool wrote beforehand."""

    images = "none"

    format: Literal["packed"]
    """packed. Required."""
    length: int = Field(gt=1)
    """Tokens per row, as they were written. Required."""

    def row_format(self) -> TextFormat:
        from data_pipeline.transforms.text_formats import PackedFormat  # imports numpy

        return PackedFormat(self.length)


class DialogueOptions(TextOptions):
    """Questions and answers in turn (not available yet)."""

    available = False
    images = "allowed"

    format: Literal["dialogue"]
    """dialogue (not available yet). Required."""
    tokenizer: str | None = None
    """As in caption. Default: that of the language model."""
    length: int = Field(gt=2)
    """Tokens per row. Required."""
    template: str | None = None
    """Conversation template, for example vicuna. Default: none."""


class PrefixSuffixOptions(TextOptions):
    """A prompt that is not learnt, and the answer that is (not available yet)."""

    available = False
    images = "allowed"

    format: Literal["prefix_suffix"]
    """prefix_suffix (not available yet). Required."""
    tokenizer: str | None = None
    """As in caption. Default: that of the language model."""
    length: int = Field(gt=2)
    """Tokens per row. Required."""


# `text.format` -> class of the section.
TEXT_FORMATS: dict[str, type[TextOptions]] = {
    "caption": CaptionOptions,
    "packed": PackedOptions,
    "dialogue": DialogueOptions,
    "prefix_suffix": PrefixSuffixOptions,
}


def parse_text(value: Any) -> Any:
    """A `text` section as the keys of its format. Raises ValidationError at the key that is wrong."""
    return parse_variant(value, "format", TEXT_FORMATS, default="caption")
