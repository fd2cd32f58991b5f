"""`RowBuilder`: reads one sample with retries, decodes and tokenises it, or rejects its content."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline import activity
from data_pipeline.batches.spec import Batch, StreamSpec
from data_pipeline.errors import ContentError, ReadError, UserError
from data_pipeline.sources.manifest import Manifest
from data_pipeline.sources.shard_reader import ShardReader
from data_pipeline.sources.tar import IMAGE_EXTENSIONS, image_member
from data_pipeline.storage.cache import CacheSettings
from data_pipeline.transforms.augment import Augmentation, draw_augmentations
from data_pipeline.transforms.captions import json_member, pick_caption
from data_pipeline.transforms.decode import decode_image
from data_pipeline.transforms.tokenizers import Tokenizer, caption_row

if TYPE_CHECKING:
    from data_pipeline.sources.fetch_units import Units

# Seconds to wait before each retry of a failed read. Afterwards the run stops: a read error never replaces a sample.
RETRY_AFTER = (0.1, 1.0, 4.0)


@dataclass
class Row:
    """One row without its pixels.

    tokens: int32 [length]
    used: tokens that are not padding
    crop: result of decode_image; () without an image
    choice: number of the caption among the sample's captions; -1 without captions
    meta: key, caption and json member; only in evaluation
    """

    tokens: np.ndarray
    used: int
    crop: tuple[int, ...]
    choice: int
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

    @property
    def length(self) -> int:
        """Tokens of a row; 0 in a stream without text."""
        if self.spec.text is not None:
            return self.spec.text.length
        return (self.spec.length or 0) if self.spec.packed else 0

    def make(
        self, source: str, shard: int, index: int, augmentation: Augmentation | None, out: np.ndarray | None
    ) -> Row:
        """The row of one sample; its pixels are written to `out`, uint8 [size, size, 3].

        Without `augmentation` (evaluation) nothing is random. Raises ContentError if the sample is unusable, ReadError
        if its bytes cannot be read.
        """
        sample_key, members = self._read(source, shard, index)
        with activity.decoding(source, shard, index):
            if self.spec.packed:
                return Row(self._packed(members, source, shard, sample_key), self.length, (), -1)
            return self._row(sample_key, members, augmentation, out)

    def _row(
        self,
        sample_key: str,
        members: dict[str, bytes],
        augmentation: Augmentation | None,
        out: np.ndarray | None,
    ) -> Row:
        crop: tuple[int, ...] = ()
        if self.spec.image is not None:
            assert out is not None
            crop = decode_image(_image_of(members), self.spec.image, augmentation, out)
        tokens, used, caption, choice = np.zeros(0, np.int32), 0, None, -1
        if self.spec.text is not None:
            assert self.tokenizer is not None
            text = self.spec.text
            caption, choice = pick_caption(
                members, augmentation.caption if augmentation else None, text.captions
            )
            tokens, used = caption_row(self.tokenizer, caption, text.length)
        row = Row(tokens, used, crop, choice)
        if augmentation is None:
            row.meta = {"key": sample_key, "caption": caption, "json": json_member(members)}
        return row

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
    def _dummy(self) -> Row:
        """A dummy row: an empty caption, or one token of packed text. No row of weight 1 is shorter.

        A model computes it like any other row. A row of padding alone would be NaN under an attention mask.
        """
        if self.spec.text is not None:
            assert self.tokenizer is not None
            return Row(*caption_row(self.tokenizer, "", self.length), (), -1)
        return Row(np.zeros(self.length, np.int32), min(1, self.length), (), -1)

    def empty_batch(
        self, step: int, start: int, stop: int, pixels: np.ndarray | None = None, dummies: int = 0
    ) -> Batch:
        """A batch of rows [start, stop), and `dummies` more; all are dummy rows until `fill_row` fills them.

        `pixels` is used as the memory of its images if given. Raises ValueError if it has another shape, dtype or
        layout.
        """
        rows = stop - start + dummies
        if self.spec.image is not None:
            shape = (rows, self.spec.image.size, self.spec.image.size, 3)
            pixels = np.zeros(shape, np.uint8) if pixels is None else pixels
            if pixels.shape != shape or pixels.dtype != np.uint8 or not pixels.flags.c_contiguous:
                raise ValueError(
                    f"pixels is {pixels.dtype} {pixels.shape}; expected contiguous uint8 {shape}"
                )
        return Batch(
            stream=self.spec.name,
            step=step,
            start=start,
            stop=stop,
            pixels=pixels if self.spec.image else None,
            tokens=np.tile(self._dummy.tokens, (rows, 1)),
            used=np.full(rows, self._dummy.used, np.int32),
            weights=np.zeros(rows, np.float32),
            sample_ids=np.zeros(rows, np.uint64),
            row_keys=np.zeros(rows, np.uint64),
        )

    def fill_row(self, batch: Batch, i: int, row: Row) -> None:
        """Copy `row` to row i of the batch, which gets weight 1; its pixels are in the batch already."""
        batch.tokens[i] = row.tokens
        batch.used[i] = row.used
        batch.weights[i] = 1

    def check(self, source: str) -> None:
        """Raise UserError if the first samples of a source, up to 8, are all unusable."""
        counts = self.manifests[source].counts
        shard = int(np.flatnonzero(counts)[0])
        rejections: list[Rejection] = []
        (augmentation,) = draw_augmentations(np.zeros(1, np.uint64))
        size = self.spec.image.size if self.spec.image else 0
        out = np.empty((size, size, 3), np.uint8)
        for number in range(min(8, int(counts[shard]))):
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
        if self.spec.packed:
            expected = f"npy with {self.length} packed tokens"
        else:
            contents = [f"an image ({', '.join(IMAGE_EXTENSIONS)})"] if self.spec.image else []
            if self.spec.text is not None:
                captions = self.spec.text.captions
                where = " or ".join(captions.members) if captions else "txt, or caption in json"
                contents.append(f"a caption ({where})")
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

    def _packed(self, members: dict[str, bytes], source: str, shard: int, key: str) -> np.ndarray:
        """Tokens of a packed sample, int32 [length].

        Raises ContentError for a damaged file, but UserError for tokens of another type or length: then the recipe does
        not fit the data.
        """
        if "npy" not in members:
            raise ContentError("missing tokens", f"members: {', '.join(members) or 'none'}")
        try:
            tokens = _array(members["npy"])
        except ValueError as error:
            raise ContentError("undecodable", str(error)) from error
        if tokens.ndim != 1 or tokens.dtype not in (np.dtype(np.uint16), np.dtype(np.uint32)):
            mistake = f"{tokens.dtype} {list(tokens.shape)}; packed text is uint16 or uint32 of one dimension"
        elif len(tokens) != self.length:
            mistake = (
                f"{len(tokens)} tokens, but data.{self.spec.name}.length is {self.length}; make them equal"
            )
        else:
            return tokens.astype(np.int32)
        raise UserError(
            f"data.{self.spec.name}.sources.{source}: {self.url(source, shard)}, sample {key!r}: {mistake}"
        )


def _array(npy: bytes) -> np.ndarray:
    """The array of an npy file; never unpickles. Raises ValueError."""
    file = io.BytesIO(npy)
    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
    # numpy evaluates the header as Python, which can fail in any way, MemoryError included.
    except Exception as error:
        raise ValueError(f"invalid header: {type(error).__name__}: {error}") from error
    claimed, available = prod(shape) * dtype.itemsize, len(npy) - file.tell()
    if claimed > available:  # checked here, because numpy allocates the claimed size before it reads
        raise ValueError(f"the header claims {claimed} bytes of {dtype}, the file has {available}")
    return np.lib.format.read_array(io.BytesIO(npy), allow_pickle=False)


def _image_of(members: dict[str, bytes]) -> bytes:
    extension = image_member(members)
    if extension is None:
        raise ContentError("missing image", f"members: {', '.join(members) or 'none'}")
    return members[extension]
