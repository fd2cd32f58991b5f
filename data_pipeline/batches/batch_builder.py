"""`BatchBuilder`: builds any rows of any step of a stream; unusable samples are replaced, counted and named."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.batches.row_builder import Rejection, Row, RowBuilder, open_tokenizer
from data_pipeline.batches.spec import Batch, StreamSpec
from data_pipeline.errors import ContentError, UserError
from data_pipeline.order import digest
from data_pipeline.order.stream_order import SampleRefs, SourceCounts, StreamOrder, row_keys, sample_ids
from data_pipeline.sources.manifest import Manifest, open_source
from data_pipeline.storage.cache import CacheSettings
from data_pipeline.transforms.augment import Augmentation, draw_augmentations
from data_pipeline.transforms.tokenizers import Tokenizer

if TYPE_CHECKING:
    from data_pipeline.sources.fetch_units import Units


# 8 replacements from the shard, then 8 from the whole source. If all are unusable, the source is broken.
ATTEMPTS = 16


def open_sources(spec: StreamSpec) -> dict[str, Manifest]:
    """Manifests by source name, in the order of the mixture. Raises UserError."""
    return {name: open_source(name, source.path, source.view) for name, source in spec.sources.items()}


def order_of(spec: StreamSpec, manifests: Mapping[str, Manifest]) -> StreamOrder:
    """StreamOrder of a stream from the manifests of its sources. Raises UserError that names the stream."""
    counts = [
        SourceCounts(
            name,
            manifests[name].counts,
            weight=source.weight,
            repeat=source.repeat,
            cap=source.cap,
            max_epochs=source.max_epochs,
        )
        for name, source in spec.sources.items()
    ]
    try:
        return StreamOrder(counts, spec.batch, spec.lanes, spec.seed, spec.share_by, spec.segments)
    except UserError as error:
        raise UserError(f"data.{spec.name}: {error}") from None


@dataclass
class ServedRow:
    """The sample of a row, and the rejected samples that it replaces."""

    shard: int
    index: int
    row: Row
    rejections: list[Rejection]


class BatchBuilder:
    """Builds batches of one stream; equal specifications give equal batches, in any process and in any order of calls.

    The replacement of an unusable sample comes from its shard in the first 8 attempts, then from the whole source.

    manifests, tokenizer: opened from `spec` by default; with both given, a worker reads no file but the shards
    cache: of this node, for object-store data; None: nothing is cached
    known_bad: (source, shard, index) -> reason; these samples are replaced for that reason without being decoded

    Raises UserError.
    """

    def __init__(
        self,
        spec: StreamSpec,
        manifests: Mapping[str, Manifest] | None = None,
        tokenizer: Tokenizer | None = None,
        cache: CacheSettings | None = None,
    ) -> None:
        self.spec = spec
        self.cache = cache
        self.manifests = dict(open_sources(spec) if manifests is None else manifests)
        self.tokenizer = open_tokenizer(spec) if tokenizer is None else tokenizer
        self.names = list(spec.sources)
        self.order = order_of(spec, self.manifests)
        self._rows = RowBuilder(spec, self.manifests, self.tokenizer, cache)
        self.known_bad: dict[tuple[str, int, int], str] = {}

    def with_spec(self, spec: StreamSpec) -> BatchBuilder:
        """A builder for another specification of the same sources."""
        return BatchBuilder(spec, self.manifests, self.tokenizer, self.cache)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Source name -> fingerprint of its manifest."""
        return {name: self.manifests[name].fingerprint for name in self.names}

    def units(self, source: str) -> Units | None:
        """Ranges in which the samples of a source are fetched and cached; None for files on disk."""
        return self._rows.units(source)

    def check(self) -> None:
        """Raise UserError if the first samples of a source are all unusable; a run calls this before its first step."""
        for name in self.names:
            self._rows.check(name)

    def make(self, step: int, start: int, stop: int, pixels: np.ndarray | None = None) -> Batch:
        """Rows [start, stop) of the global batch at `step`; steps and rows count from 0.

        `pixels`, contiguous uint8 [rows, images, size, size, 3], is used as the memory of the images if given.

        order_digest covers the assignment, with attempt 0, crop () and caption -1, because the assignment is known
        before a sample is read. batch_digest covers the served samples. Raises UserError and ReadError.
        """
        # 1. Assign. Replacements are chosen by position in the view; a sample's identity is its position in the tar.
        drawn = self.order.refs(step, start, stop)
        refs = self._in_tars(drawn)
        batch = self._rows.empty_batch(step, start, stop, pixels)
        images = batch.fields.get("pixels")
        for number, name in enumerate(self.names):
            rows = refs.source == number
            self._rows.expect(name, refs.shard[rows], refs.index[rows])
        augmentations = self._augmentations(refs)
        # 2. Read and decode each row, with replacements for unusable samples.
        shards, indices = refs.shard.copy(), refs.index.copy()
        attempts = np.zeros(stop - start, np.int64)
        skipped: dict[str, Counter[str]] = defaultdict(Counter)
        for i in range(stop - start):
            served = self._serve(refs, drawn, i, augmentations[i], None if images is None else images[i])
            shards[i], indices[i], attempts[i] = served.shard, served.index, len(served.rejections)
            source = self.names[refs.source[i]]
            if served.rejections:
                # The assigned sample counts, once. Unusable replacements for it are lines of bad_samples.jsonl only:
                # otherwise a source could have more replaced samples than samples.
                skipped[source][served.rejections[0][2].reason] += 1
            for attempt, (shard, index, error) in enumerate(served.rejections):
                place = {"step": step, "row": int(refs.row[i])}
                place |= {"epoch": int(refs.epoch[i]), "attempt": attempt}
                batch.bad.append(place | self._rows.bad_sample_record(source, shard, index, error))
            self._rows.fill_row(batch, i, served.row)
            self._add_digests(batch, refs, i, served)
        # 3. Keys, identifiers and counts of the samples that were served.
        batch.row_keys[:] = self._row_keys(refs, shards, indices, attempts)
        for number, name in enumerate(self.names):
            rows = refs.source == number
            if rows.any():
                batch.sample_ids[rows] = sample_ids(name, shards[rows], indices[rows])
                batch.samples[name] = int(rows.sum())
        batch.skipped = {source: dict(reasons) for source, reasons in skipped.items()}
        return batch

    def dummy_rows(self, step: int, at: int, count: int) -> Batch:
        """`count` dummy rows behind row `at` of the global batch; nothing is read."""
        return self._rows.empty_batch(step, at, at, dummies=count)

    def close(self) -> None:
        """Close the files that are open for reading."""
        self._rows.close()

    def _in_tars(self, refs: SampleRefs) -> SampleRefs:
        """The same rows with positions in the tars, so that a sample has one identity with and without a view."""
        index = refs.index.copy()
        for number, name in enumerate(self.names):
            if self.manifests[name].view is not None:
                rows = refs.source == number
                index[rows] = self.manifests[name].tar_positions(refs.shard[rows], index[rows])
        return replace(refs, index=index)

    def _augmentations(self, refs: SampleRefs) -> Sequence[Augmentation | None]:
        """Augmentations of the assigned samples; None for text without a random choice."""
        attempts = np.zeros(len(refs.row), np.int64)
        text = self.spec.text
        if self.spec.image is None and text is not None and not text.random:
            return [None] * len(attempts)
        return draw_augmentations(self._row_keys(refs, refs.shard, refs.index, attempts))

    def _serve(
        self,
        refs: SampleRefs,
        drawn: SampleRefs,
        i: int,
        augmentation: Augmentation | None,
        out: np.ndarray | None,
    ) -> ServedRow:
        """Build row i from its assigned sample, or from the first usable replacement.

        `refs` has positions in the tars, `drawn` in the view. Raises UserError if all replacements are unusable.
        """
        number, epoch = int(refs.source[i]), int(refs.epoch[i])
        name = self.names[number]
        shard, index = int(refs.shard[i]), int(refs.index[i])
        rejections: list[Rejection] = []
        for attempt in range(1, ATTEMPTS + 2):
            try:
                if (name, shard, index) in self.known_bad:
                    raise ContentError(self.known_bad[name, shard, index])
                return ServedRow(
                    shard, index, self._rows.make(name, shard, index, augmentation, out), rejections
                )
            except ContentError as error:
                rejections.append((shard, index, error))
            shard, index = self.order.replacement(
                number, int(drawn.shard[i]), int(drawn.index[i]), epoch, attempt
            )
            index = self.manifests[name].tar_position(shard, index)
            (augmentation,) = draw_augmentations(self._row_key(name, shard, index, epoch, attempt))
        raise self._rows.unusable_error(name, rejections)

    def _row_key(self, name: str, shard: int, index: int, epoch: int, attempt: int) -> np.ndarray:
        place = np.array([[shard], [index], [epoch]])
        return row_keys(self.spec.seed, name, place[0], place[1], place[2], attempt)

    def _row_keys(
        self, refs: SampleRefs, shards: np.ndarray, indices: np.ndarray, attempts: np.ndarray
    ) -> np.ndarray:
        """Keys of all rows, uint64 [rows]."""
        keys = np.zeros(len(shards), np.uint64)
        for number, name in enumerate(self.names):
            rows = refs.source == number
            if rows.any():
                keys[rows] = row_keys(
                    self.spec.seed, name, shards[rows], indices[rows], refs.epoch[rows], attempts[rows]
                )
        return keys

    def _add_digests(self, batch: Batch, refs: SampleRefs, i: int, served: ServedRow) -> None:
        """Add row i to both digests."""
        name = self.names[refs.source[i]]
        paths = self.manifests[name].paths
        row, epoch, shard, index = (a.item(i) for a in (refs.row, refs.epoch, refs.shard, refs.index))
        assigned = digest.row_digest(self.spec.name, row, name, paths[shard], index, 0, epoch, (), -1)
        actual = digest.row_digest(
            self.spec.name,
            row,
            name,
            paths[served.shard],
            served.index,
            len(served.rejections),
            epoch,
            served.row.crop,
            served.row.text.choice,
        )
        batch.order_digest = digest.add(batch.order_digest, assigned)
        batch.batch_digest = digest.add(batch.batch_digest, actual)
