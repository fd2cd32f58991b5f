"""Plain data sent between ranks, workers and actors: SourceSpec, StreamSpec, and `Batch` with its arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.order.batch_schedule import BatchSchedule
from data_pipeline.order.mixture_weights import ShareBy
from data_pipeline.order.state import Segment
from data_pipeline.transforms.decode import ImageSpec
from data_pipeline.transforms.text_formats import RESERVED, RowArray, TextFormat


@dataclass(frozen=True)
class SourceSpec:
    """One dataset of a mixture.

    path: folder, pattern or file of tars, local or s3://
    weight, repeat, cap, max_epochs: its share of the stream, see stream_order.SourceCounts
    view: name of a view written by `dromos data view`; the source then has only the samples that the view keeps
    """

    path: str
    weight: float | None = None
    repeat: float | None = None
    cap: int | None = None
    max_epochs: float | None = None
    view: str | None = None


@dataclass(frozen=True)
class StreamSpec:
    """A named mixture of sources and its global batch.

    seed: from `stream_order.stream_seed`
    batch: rows of the global batch, or a schedule of them
    share_by: how sources without a weight share the rows
    segments: of a run that continues with a changed mixture, see `StreamOrder.resume`

    text: how the text of a sample becomes arrays, such as CaptionFormat or PackedFormat

    A sample has an image, a text or both. Raises UserError for values that are invalid whatever the data is.
    """

    name: str
    seed: int
    sources: Mapping[str, SourceSpec]
    batch: int | BatchSchedule
    lanes: int | None = None
    image: ImageSpec | None = None
    text: TextFormat | None = None
    share_by: ShareBy = "size"
    segments: tuple[Segment, ...] = ()

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError(f"data.{self.name}.sources: there are none; write at least one source")
        if self.image is None and self.text is None:
            raise UserError(f"data.{self.name}: write image, text or both")
        mistake = next(self._mistakes(), None)
        if mistake is not None:
            raise UserError(f"data.{self.name}.{mistake}")

    def _mistakes(self) -> Iterator[str]:
        """Mistakes that the checks of a recipe would find too; a StreamSpec may be built without a recipe."""
        if self.image is not None:
            low, high = self.image.crop
            if self.image.size < 1:
                yield f"image.size is {self.image.size}; it must be at least 1 pixel"
            if not 0 < low <= high <= 1:
                yield f"image.crop is ({low}, {high}); it must be a range of shares with 0 < low <= high <= 1"
            if self.image.max_pixels < 1:
                yield f"image.max_pixels is {self.image.max_pixels}; it must be at least 1"
        if self.text is not None:
            yield from (f"text.{mistake}" for mistake in self.text.mistakes())
            for name, array in self.text.arrays.items():
                if name in RESERVED:
                    yield f"text: the format's array {name!r} has a name that every batch uses itself"
                if mistake := array.mistake():
                    yield f"text: the format's array {name!r}: {mistake}"
        if self.share_by not in get_args(ShareBy):
            yield f"share_by is {self.share_by!r}; write one of {', '.join(get_args(ShareBy))}"

    @property
    def batches(self) -> BatchSchedule:
        """`batch` as a schedule."""
        return BatchSchedule.of(self.batch)

    def rows(self, step: int) -> int:
        """Rows of the global batch at `step`, counted from 0."""
        return self.batches.at(step)

    @property
    def largest(self) -> int:
        """Rows of the largest global batch."""
        return self.batches.largest

    @property
    def arrays(self) -> dict[str, RowArray]:
        """The arrays of a row by name: `pixels` with `image`, and those of the text format."""
        arrays = dict(self.text.arrays) if self.text is not None else {}
        if self.image is not None:
            arrays["pixels"] = RowArray("uint8", (1, self.image.size, self.image.size, 3))
        return arrays


@dataclass
class Batch:
    """Rows [start, stop) of the global batch of one stream at one step; behind them dummy rows, if a rank needs them.

    A dummy row has no sample and weight 0; its pixels are 0 and its text is that of `TextFormat.dummy`, such as an
    empty caption.

    fields: name -> array [rows, ...]: `pixels`, uint8 [rows, images, size, size, 3], contiguous, in a stream with
        images (one each today); and the arrays of the text format, `tokens` and `used` in most
    weights: float32 [rows], 0 for rows without a sample (dummy rows and, in an evaluation, unusable samples), else 1
    sample_ids: uint64 [rows], the same for a sample in every epoch; 0 in dummy rows
    row_keys: uint64 [rows], keys of each row's random choices, such as its masks
    samples: source -> rows served
    skipped: source -> reason -> samples replaced; each row counts once, for the reason of the sample assigned to it
    batch_digest: sum mod 2^64 of the digests of the served rows
    order_digest: sum mod 2^64 of the digests of the assigned rows, independent of replacements
    bad: one line of bad_samples.jsonl for each unusable sample that was tried: the assigned one is `attempt` 0, those
        after it are replacements that could not be used either
    meta: key, caption and json member of each row; only in evaluation
    """

    stream: str
    step: int
    start: int
    stop: int
    fields: dict[str, np.ndarray]
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
    def rows(self) -> int:
        """Rows of the batch, dummy rows included."""
        return len(self.weights)

    @property
    def pixels(self) -> np.ndarray | None:
        """The only image of each row, a view uint8 [rows, size, size, 3]; None without images.

        Raises ValueError if rows have several images; `fields["pixels"]` has them all.
        """
        pixels = self.fields.get("pixels")
        if pixels is None:
            return None
        if pixels.shape[1] != 1:
            raise ValueError(
                f"a row of stream {self.stream!r} has {pixels.shape[1]} images; read fields['pixels']"
            )
        return pixels[:, 0]

    @property
    def images(self) -> np.ndarray | None:
        """The only image of each row, a view uint8 [rows, 3, size, size]; the memory stays channels-last."""
        pixels = self.pixels
        return None if pixels is None else pixels.transpose(0, 3, 1, 2)

    @property
    def tokens(self) -> np.ndarray:
        """int32 [rows, length]; length 0 in a stream without text."""
        return self.fields["tokens"] if "tokens" in self.fields else np.zeros((self.rows, 0), np.int32)

    @property
    def used(self) -> np.ndarray:
        """Tokens of each row that are not padding, int32 [rows]."""
        return self.fields["used"] if "used" in self.fields else np.zeros(self.rows, np.int32)
