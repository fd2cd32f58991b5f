"""The `data` section of a recipe: sources, image and text settings, and the global batch of each stream."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from data_pipeline.errors import UserError
from data_pipeline.order.batch_schedule import BatchSchedule
from pretrain.recipe.fields import Count, Strict
from pretrain.recipe.sections.text_formats import TextOptions, parse_text


def parse_batch(value: Any) -> Any:
    """An int (rows), or a dict {first step: rows} sorted by step. Raises ValueError for anything else."""
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
        steps = ", ".join(map(str, value)) or "missing"
        raise ValueError(
            f"the first steps are {steps}; they must begin with 0 and be whole numbers, as in {{0: 1024, 1000: 4096}}"
        ) from None
    return dict(zip(schedule.first, schedule.rows, strict=True))


def parse_source(value: Any) -> Any:
    """A bare path is short for `{path: PATH}`."""
    return {"path": value} if isinstance(value, str) else value


class Source(Strict):
    """One dataset of a stream."""

    path: str
    """Folder of tars, or brace pattern such as data/{00000..00031}.tar; local or s3://. Required."""
    weight: float | None = Field(None, gt=0)
    """Share of the rows: relative to the other weights, or a fraction of the stream if some sources have no weight.

    Default: in proportion to the source's size.
    """
    repeat: float | None = Field(None, gt=0)
    """Factor on the source's size when shares follow size. Not with `weight`. Default: 1."""
    cap: Count | None = Field(None, gt=0)
    """Upper limit of the source's size, in samples, when shares follow size. Not with `weight`. Default: no limit."""
    max_epochs: float | None = Field(None, gt=0)
    """The source ends after this many passes over its samples. Default: it never ends."""
    view: str | None = None
    """Name of a view of the source, written by `dromos data view`; only its samples are used. Default: all samples."""


class Image(Strict):
    """From image bytes to normalised pixels."""

    size: int = Field(224, gt=0)
    """Height and width of the square image that the vision tower receives, in pixels. Default: 224."""
    crop: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest area of the random crop, as fractions of the image. Default: [1, 1], the whole image."""
    flip: bool = False
    """Mirror an image left to right with probability 0.5. Default: false."""
    max_pixels: Count = Field(25_000_000, gt=0, le=178_000_000)
    """Images with more pixels are unusable samples; decoding takes 3 bytes per pixel. Default: 25M."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of R, G and B that is subtracted, on the scale 0 to 1. Default: the mean of CLIP (OpenAI)."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of R, G and B, on the scale 0 to 1. Default: the deviation of CLIP (OpenAI)."""


class Stream(Strict):
    """A named mixture of sources that an objective consumes, and its global batch."""

    sources: dict[str, Annotated[Source, BeforeValidator(parse_source)]] = Field(default_factory=dict)
    """Source name -> path, or {path, weight, repeat, cap, max_epochs, view}. Required: at least one."""
    batch: Annotated[int | dict[int, int], BeforeValidator(parse_batch)] = 256
    """Rows of the global batch over all ranks; or first step -> rows, as {0: 1024, 1000: 4096}. Default: 256."""
    lanes: int | None = Field(None, gt=0)
    """Number of lanes; must divide every batch. Default: the largest common divisor of all batches up to 1024.

    A lane is a fixed part of the global batch with its own order of samples.
    """
    share_by: Literal["size", "sqrt"] = "size"
    """Sources without `weight` share rows by size, or by the square root of size. Default: size."""
    order_as: str | None = None
    """Stage whose order, crops and masks this stream repeats. Default: its own."""
    image: Image | None = None
    """Image settings. Default: none, which makes this a text stream."""
    text: Annotated[SerializeAsAny[TextOptions], BeforeValidator(parse_text)] | None = None
    """Text settings. Default: none, a stream of images alone."""

    @property
    def batches(self) -> BatchSchedule:
        return BatchSchedule.of(self.batch)
