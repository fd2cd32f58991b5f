"""What a stream is and what a batch holds: plain data that travels between ranks, workers and actors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.order.batch_schedule import BatchSchedule
from data_pipeline.order.mixture_weights import ShareBy
from data_pipeline.order.state import Segment
from data_pipeline.transforms.captions import CaptionSpec
from data_pipeline.transforms.decode import ImageSpec


@dataclass(frozen=True)
class SourceSpec:
    """One dataset of a mixture: a folder or pattern of tars, and how much of it.

    `view` names a view that `dromos data view` made of the source: the samples it keeps are all there are.
    """

    path: str
    weight: float | None = None
    repeat: float | None = None
    cap: int | None = None
    max_epochs: float | None = None
    view: str | None = None


@dataclass(frozen=True)
class TextSpec:
    """How a caption becomes tokens: `clip-bpe` or the path of a tokenizer.json, and the row's length.

    `captions` says where captions stand and how one of several is chosen; None: see `captions.pick_caption`.
    """

    tokenizer: str
    length: int
    captions: CaptionSpec | None = None


@dataclass(frozen=True)
class StreamSpec:
    """A named mixture of sources and its global batch; seed comes from `order.stream_seed`.

    `batch` is a number of rows, or a schedule of them. `share_by` says how sources without a weight share the rows.
    `segments` are those of a run that goes on with a changed mixture, see `StreamOrder.resume`.

    With `image` or `text` a sample is an image and a caption. With neither it is a packed sequence of
    `length` tokens, made offline.
    """

    name: str
    seed: int
    sources: Mapping[str, SourceSpec]
    batch: int | BatchSchedule
    lanes: int | None = None
    image: ImageSpec | None = None
    text: TextSpec | None = None
    length: int | None = None
    share_by: ShareBy = "size"
    segments: tuple[Segment, ...] = ()

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError(f"data.{self.name}.sources: no source is named")
        if self.packed and self.length is None:
            raise UserError(f"data.{self.name}: needs image and text, or the length of its packed sequences")
        wrong = next(self._wrong(), None)
        if wrong is not None:
            raise UserError(f"data.{self.name}.{wrong}")

    def _wrong(self) -> Iterator[str]:
        """What no data makes possible, as a recipe's own checks would find it."""
        if self.image is not None:
            low, high = self.image.crop
            if self.image.size < 1:
                yield f"image.size is {self.image.size}; it must be at least 1 pixel"
            if not 0 < low <= high <= 1:
                yield f"image.crop is ({low}, {high}), no range of shares; write 0 < low <= high <= 1"
            if self.image.max_pixels < 1:
                yield f"image.max_pixels is {self.image.max_pixels}; it must be at least 1"
        if self.text is not None and self.text.length < 3:
            yield f"text.length is {self.text.length}; a start token, a caption and an end token need at least 3"
        if self.packed and self.length is not None and self.length < 1:
            yield f"length is {self.length}; it must be at least 1 token"
        if self.share_by not in get_args(ShareBy):
            yield f"share_by is {self.share_by!r}; write one of {', '.join(get_args(ShareBy))}"

    @property
    def batches(self) -> BatchSchedule:
        return BatchSchedule.of(self.batch)

    def rows(self, step: int) -> int:
        """Rows of the global batch of `step`, counted from 0."""
        return self.batches.at(step)

    @property
    def largest(self) -> int:
        """Rows of the largest global batch."""
        return self.batches.largest

    @property
    def packed(self) -> bool:
        return self.image is None and self.text is None


@dataclass
class Batch:
    """Rows [start, stop) of one stream's global batch of one step.

    pixels: uint8 [rows, size, size, 3], contiguous, or None in a text stream
    tokens: int32 [rows, length]; used: int32 [rows], tokens that are not padding
    weights: float32 [rows], 0 for rows that must not count (the padding of an evaluation)
    sample_ids: uint64 [rows], the same for a sample in every epoch
    row_keys: uint64 [rows], from which a row's masks are drawn
    samples: rows served, by source; skipped: samples replaced, by source and reason; bad: each of those
    batch_digest, order_digest: sums mod 2^64 over these rows of what was served, and of what was assigned
    meta: key, caption and json member of each row; only in evaluation
    """

    stream: str
    step: int
    start: int
    stop: int
    pixels: np.ndarray | None
    tokens: np.ndarray
    used: np.ndarray
    weights: np.ndarray
    sample_ids: np.ndarray
    row_keys: np.ndarray
    samples: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, dict[str, int]] = field(default_factory=dict)
    batch_digest: int = 0
    order_digest: int = 0
    bad: list[dict[str, Any]] = field(default_factory=list)
    meta: list[dict[str, Any]] | None = None

    @property
    def images(self) -> np.ndarray | None:
        """The pixels as uint8 [rows, 3, size, size]: a view, whose memory stays channels-last."""
        return None if self.pixels is None else self.pixels.transpose(0, 3, 1, 2)
