"""`RowBuilder`: reads one sample with retries, decodes and tokenises it, or rejects its content."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline import activity
from data_pipeline.batches.spec import Batch, StreamSpec
from data_pipeline.errors import ContentError, ReadError, UserError
from data_pipeline.sources.manifest import Manifest
from data_pipeline.sources.sample_check import SAMPLES_AT_START, read_sample
from data_pipeline.sources.shard_reader import ShardReader
from data_pipeline.sources.tar import IMAGE_EXTENSIONS
from data_pipeline.storage.cache import CacheSettings
from data_pipeline.transforms.augment import Augmentation, draw_augmentations
from data_pipeline.transforms.captions import json_member
from data_pipeline.transforms.decode import decode_image
from data_pipeline.transforms.text_formats import RowCheck, TextFormat, TextRow, failure_of
from data_pipeline.transforms.tokenizers import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from data_pipeline.sources.fetch_units import Units

# Seconds to wait before each retry of a failed read. Afterwards the run stops: a read error never replaces a sample.
RETRY_AFTER = (0.1, 1.0, 4.0)


NO_TEXT = TextRow({})


def open_tokenizer(spec: StreamSpec) -> Tokenizer | None:
    """The tokenizer of a stream; None if its text needs none. Raises UserError."""
    return load_tokenizer(spec.text.tokenizer) if spec.text is not None and spec.text.tokenizer else None


@dataclass
class Row:
    """One row without its pixels.

    text: its arrays, and the number of the text among those of the sample
    crop: result of decode_image; () without an image
    meta: key, caption and json member; only in evaluation
    """

    text: TextRow
    crop: tuple[int, ...]
    meta: dict[str, Any] | None = None


# Shard, index in the shard, and the reason why the sample is unusable.
Rejection = tuple[int, int, ContentError]


class RowBuilder:
    """Builds rows of one stream. It keeps files open, so every process needs its own."""

    def __init__(
        self,
        spec: StreamSpec,
        manifests: dict[str, Manifest],
        tokenizer: Tokenizer | None,
        cache: CacheSettings | None = None,
    ) -> None:
        self.spec = spec
        self.manifests = manifests
        self.tokenizer = tokenizer
        self._readers = {name: ShardReader(manifest, cache) for name, manifest in manifests.items()}

    def make(
        self,
        source: str,
        shard: int,
        index: int,
        augmentation: Augmentation | None,
        out: np.ndarray | None,
        with_meta: bool = False,
    ) -> Row:
        """The row of one sample; its pixels are written to `out`, uint8 [images, size, size, 3].

        Without `augmentation` (evaluation) nothing is random. Raises ContentError if the sample is unusable, ReadError
        if its bytes cannot be read, UserError if the text format does not fit the data.
        """
        sample_key, members = self._read(source, shard, index)
        image, text_format = self.spec.image, self.spec.text
        decode = read_text = None
        if image is not None:
            assert out is not None
            decode = partial(decode_image, spec=image, augmentation=augmentation, out=out[0])
        if text_format is not None:
            draw = augmentation.caption if augmentation else None
            read_text = partial(self._text, text_format, draw=draw)
        with activity.decoding(source, shard, index):
            try:
                crop, text = read_sample(members, decode, read_text)
            except UserError as error:
                where = f"data.{self.spec.name}.sources.{source}: {self.url(source, shard)}"
                raise UserError(f"{where}, sample {sample_key!r}: {error}") from error
            text = text or NO_TEXT
            row = Row(text, crop or ())
            if with_meta:
                # Packed text is tokenised: nothing reads its json, which may be damaged.
                read_json = self.spec.image is not None or text.text is not None
                fields = json_member(members) if read_json else {}
                row.meta = {"key": sample_key, "caption": text.text, "json": fields}
            return row

    def _text(self, text_format: TextFormat, members: Mapping[str, bytes], draw: int | None) -> TextRow:
        """What a format makes of a sample, compared with what it promises."""
        try:
            row = text_format.row(members, self.tokenizer, draw)
        except (ContentError, UserError):
            raise
        except Exception as error:  # a format may be anybody's code
            raise UserError(failure_of(text_format, error)) from error
        arrays = self._check.arrays(row.arrays)
        return row if arrays is row.arrays else replace(row, arrays=arrays)

    def expect(self, source: str, shards: np.ndarray, indices: np.ndarray) -> None:
        """Announce the next samples of a source, in order, so that they can be read ahead."""
        self._readers[source].expect(shards.tolist(), indices.tolist())

    def units(self, source: str) -> Units | None:
        """Ranges in which the samples of a source are fetched and cached; None for files on disk."""
        return self._readers[source].units

    def url(self, source: str, shard: int) -> str:
        """URL of a shard."""
        return self.manifests[source].url(shard)

    def key_of(self, source: str, shard: int, index: int) -> str:
        """Key of a sample: the name that its tar members share."""
        return self._readers[source].key(shard, index)

    @cached_property
    def _check(self) -> RowCheck:
        assert self.spec.text is not None
        return RowCheck(self.spec.text)

    @cached_property
    def _dummy(self) -> Mapping[str, np.ndarray | float]:
        """The arrays of a dummy row, without its pixels. Raises UserError."""
        text = self.spec.text
        if text is None:
            return {}
        try:
            return self._check.arrays(text.dummy(self.tokenizer))
        except Exception as error:
            told = error if isinstance(error, UserError) else failure_of(text, error)
            raise UserError(f"data.{self.spec.name}: a dummy row: {told}") from error

    def empty_batch(
        self, step: int, start: int, stop: int, pixels: np.ndarray | None = None, dummies: int = 0
    ) -> Batch:
        """A batch of rows [start, stop), and `dummies` more; all are dummy rows until `fill_row` fills them.

        `pixels` is used as the memory of its images if given. Raises ValueError if it has another shape, dtype or
        layout.
        """
        rows = stop - start + dummies
        fields: dict[str, np.ndarray] = {}
        for name, array in self.spec.arrays.items():
            shape = (rows, *array.shape)
            if name != "pixels":
                fields[name] = np.empty(shape, array.dtype)
                fields[name][...] = self._dummy[name]
                continue
            fields[name] = pixels = np.zeros(shape, np.uint8) if pixels is None else pixels
            if pixels.shape != shape or pixels.dtype != np.uint8 or not pixels.flags.c_contiguous:
                raise ValueError(
                    f"pixels is {pixels.dtype} {pixels.shape}; expected contiguous uint8 {shape}"
                )
        return Batch(
            stream=self.spec.name,
            step=step,
            start=start,
            stop=stop,
            fields=fields,
            weights=np.zeros(rows, np.float32),
            sample_ids=np.zeros(rows, np.uint64),
            row_keys=np.zeros(rows, np.uint64),
        )

    def fill_row(self, batch: Batch, i: int, row: Row) -> None:
        """Copy `row` to row i of the batch, which gets weight 1; its pixels are in the batch already."""
        for name, value in row.text.arrays.items():
            batch.fields[name][i] = value
        batch.weights[i] = 1

    def check(self, source: str) -> None:
        """Raise UserError if the first SAMPLES_AT_START samples of a source are all unusable."""
        counts = self.manifests[source].counts
        shard = int(np.flatnonzero(counts)[0])
        rejections: list[Rejection] = []
        (augmentation,) = draw_augmentations(np.zeros(1, np.uint64))
        pixels = self.spec.arrays.get("pixels")
        out = np.empty(pixels.shape, np.uint8) if pixels is not None else None
        for number in range(min(SAMPLES_AT_START, int(counts[shard]))):
            index = self.manifests[source].tar_position(shard, number)
            try:
                self.make(source, shard, index, augmentation, out)
                return
            except ContentError as error:
                rejections.append((shard, index, error))
        raise self.unusable_error(source, rejections)

    def unusable_error(self, source: str, rejections: list[Rejection]) -> UserError:
        """The error for a source with several unusable samples in succession; it names the first of them."""
        shard, index, error = rejections[0]
        reasons = sorted({rejected.reason for _, _, rejected in rejections})
        contents = [f"an image ({', '.join(IMAGE_EXTENSIONS)})"] if self.spec.image else []
        if self.spec.text is not None:
            contents.append(self.spec.text.expected)
        expected = " and ".join(contents)
        return UserError(
            f"data.{self.spec.name}.sources.{source}: all {len(rejections)} samples that were tried are unusable "
            f"({', '.join(reasons)}). First {self.url(source, shard)}, sample "
            f"{self.key_of(source, shard, index)!r}: {error}. Expected of every sample: {expected}. "
            "Correct the path of the source or write its tars again"
        )

    def bad_sample_record(self, source: str, shard: int, index: int, error: ContentError) -> dict[str, Any]:
        """One line of bad_samples.jsonl."""
        return {
            "source": source,
            "url": self.url(source, shard),
            "key": self.key_of(source, shard, index),
            "reason": error.reason,
            "detail": error.detail,
        }

    def close(self) -> None:
        """Close the files that are open for reading."""
        for reader in self._readers.values():
            reader.close()

    def _read(self, source: str, shard: int, index: int) -> tuple[str, dict[str, bytes]]:
        """Key and members of a sample, with retries. Raises ReadError."""
        reader = self._readers[source]
        for wait in (*RETRY_AFTER, None):
            try:
                return reader.read(shard, index)
            except OSError as error:
                # A ReadError comes from an object store, which has retried already.
                if wait is None or isinstance(error, ReadError):
                    tried = "" if wait else f"not readable after {len(RETRY_AFTER) + 1} tries: "
                    raise ReadError(
                        f"source {source!r}: {self.url(source, shard)}, sample {index}: {tried}{error}. "
                        "No sample was replaced; run again when it can be read"
                    ) from error
                reader.reopen()
                time.sleep(wait)
        raise AssertionError("unreachable")
