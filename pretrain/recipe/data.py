"""A recipe's `data` section: sources, and what becomes of their images and captions."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from data_pipeline.errors import UserError
from data_pipeline.order.batch_schedule import BatchSchedule
from data_pipeline.transforms.captions import CaptionSpec
from pretrain.recipe.fields import Count, Strict


def parse_batch(value: Any) -> Any:
    """Rows, or first step -> rows in the order of steps."""
    rows = list(value.values()) if isinstance(value, dict) else [value]
    for number in rows:
        if isinstance(number, bool) or not re.fullmatch(r"\s*-?[0-9]+\s*", str(number)):
            raise ValueError(f"must be a whole number of rows, or a map first step -> rows, not {number!r}")
        if int(number) < 1:
            raise ValueError(f"must be greater than 0, not {number!r}")
    if not isinstance(value, dict):
        return int(value)
    try:
        schedule = BatchSchedule.of(value)
    except UserError:
        told = ", ".join(map(str, value)) or "missing"
        raise ValueError(
            f"its first steps are {told}; they must begin with 0 and be whole numbers, as in {{0: 1024, 1000: 4096}}"
        ) from None
    return dict(zip(schedule.first, schedule.rows, strict=True))


class Source(Strict):
    """One dataset in a stream: a folder of tars, a brace pattern of tars, or a manifest."""

    path: str = Field(description="Folder, or pattern such as data/{00000..00031}.tar; local or s3://.")
    weight: float | None = Field(None, gt=0, description="Share of the stream; absent: by number of samples.")
    repeat: float | None = Field(None, gt=0, description="Multiplies the size that the weight is taken from.")
    cap: Count | None = Field(None, gt=0, description="Bounds the size that the weight is taken from.")
    max_epochs: float | None = Field(None, gt=0, description="The source ends after this many passes.")
    view: str | None = Field(None, description="View of the source, made by `dromos data view`, to train on.")


def parse_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class Image(Strict):
    """How an image becomes pixels."""

    size: int = Field(224, gt=0, description="Side of the square fed to the tower, in pixels.")
    crop: tuple[float, float] = Field(
        (1.0, 1.0), description="Range of the crop's area, as a share of the image."
    )
    flip: bool = Field(False, description="Mirror half of the images, left to right.")
    max_pixels: Count = Field(
        25_000_000,
        gt=0,
        le=178_000_000,
        description="Larger images, such as 50M, count as unusable; decoding takes 3 bytes a pixel.",
    )
    mean: tuple[float, float, float] = Field(
        (0.48145466, 0.4578275, 0.40821073), description="Of RGB in 0..1."
    )
    std: tuple[float, float, float] = Field(
        (0.26862954, 0.26130258, 0.27577711), description="Of RGB in 0..1."
    )


class Captions(Strict):
    """Which captions of a sample come into question; each time one of them is drawn."""

    from_: list[str] = Field(
        alias="from",
        description="Members that hold a caption or a list of them: txt, json.caption, json.all_captions.",
    )
    scores: list[str | None] = Field(
        default_factory=list, description="The json.FIELD with the scores of each member in `from`, or null."
    )
    top: int | None = Field(
        None, ge=1, description="Only so many with the best scores; without scores, so many from the front."
    )

    @model_validator(mode="after")
    def _fits(self) -> Captions:
        CaptionSpec(tuple(self.from_), tuple(self.scores), self.top)
        return self


class Text(Strict):
    """How a caption becomes tokens."""

    tokenizer: str = Field("clip-bpe", description="clip-bpe, or a folder or file with a tokenizer.json.")
    length: int = Field(32, gt=2, description="Tokens in a row: start token, caption, end token, padding.")
    captions: Captions | None = Field(
        None, description="Which of several captions is taken; absent: txt, or one of caption in json."
    )


class Stream(Strict):
    """A named mixture of sources that an objective consumes, and its global batch."""

    sources: dict[str, Annotated[Source, BeforeValidator(parse_source)]] = Field(
        default_factory=dict, description="Name -> path or {path, weight, repeat, cap, max_epochs, view}."
    )
    batch: Annotated[int | dict[int, int], BeforeValidator(parse_batch)] = Field(
        256,
        description="Rows of the global batch, over all ranks; or first step -> rows, as {0: 1024, 1000: 4096}.",
    )
    lanes: int | None = Field(
        None, gt=0, description="Fixed fractions of the rows; default: largest divisor of batch up to 1024."
    )
    share_by: Literal["size", "sqrt"] = Field(
        "size", description="Sources without a weight share the rows by size, or by the square root of it."
    )
    order_as: str | None = Field(None, description="Stage whose order, crops and masks this stream shares.")
    length: int | None = Field(
        None, gt=1, description="Tokens of a packed text sequence; only for text streams."
    )
    image: Image | None = Field(None, description="Absent in a text stream.")
    text: Text | None = Field(None, description="Absent in a text stream, which is packed beforehand.")

    @property
    def batches(self) -> BatchSchedule:
        return BatchSchedule.of(self.batch)
