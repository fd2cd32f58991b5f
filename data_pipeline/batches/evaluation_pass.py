"""One pass over a held-out source in manifest order, without random crops; the last batch is padded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipeline.batches.batch_builder import open_sources
from data_pipeline.batches.row_builder import RowBuilder, open_tokenizer
from data_pipeline.batches.spec import Batch, StreamSpec
from data_pipeline.errors import ContentError, UserError
from data_pipeline.order import digest
from data_pipeline.order.stream_order import row_keys, sample_ids
from data_pipeline.sources.manifest import Manifest
from data_pipeline.storage.cache import CacheSettings
from data_pipeline.transforms.tokenizers import Tokenizer


class EvaluationPass:
    """All samples of a stream with one source, once, in `len()` batches of equal size.

    The last batch is padded with dummy rows. An unusable sample keeps its row, with weight 0, and is counted: a
    replacement would count twice in the result. `cache` is by default the node's cache in its default folder.

    Raises UserError.
    """

    def __init__(
        self,
        spec: StreamSpec,
        manifests: Mapping[str, Manifest] | None = None,
        tokenizer: Tokenizer | None = None,
        cache: CacheSettings | None = None,
    ) -> None:
        if len(spec.sources) != 1:
            raise UserError(f"evaluation {spec.name}: expected one source, not {', '.join(spec.sources)}")
        self.spec = spec
        self.source = next(iter(spec.sources))
        self.manifests = dict(open_sources(spec) if manifests is None else manifests)
        self.tokenizer = open_tokenizer(spec) if tokenizer is None else tokenizer
        self._rows = RowBuilder(spec, self.manifests, self.tokenizer, cache or CacheSettings.of())
        self._ends = np.cumsum(self.manifests[self.source].counts)

    @property
    def samples(self) -> int:
        """Samples of the source."""
        return int(self._ends[-1])

    def __len__(self) -> int:
        return -(-self.samples // self.spec.largest)

    def check(self) -> None:
        """Raise UserError if the first samples are all unusable."""
        self._rows.check(self.source)

    def make(self, number: int, start: int, stop: int, dummies: int = 0) -> Batch:
        """Rows [start, stop) of batch `number`, from 0, and `dummies` dummy rows.

        `meta` has the key, caption and json member of each row.
        """
        batch = self._rows.empty_batch(number, start, stop, dummies=dummies)
        batch.meta = []
        position = number * self.spec.largest + np.arange(start, stop, dtype=np.int64)
        real = int((position < self.samples).sum())
        shards = np.searchsorted(self._ends, position[:real], side="right").astype(np.int64)
        indices = position[:real] - (self._ends - self.manifests[self.source].counts)[shards]
        indices = self.manifests[self.source].tar_positions(shards, indices)
        batch.sample_ids[:real] = sample_ids(self.source, shards, indices)
        batch.row_keys[:real] = row_keys(
            self.spec.seed, self.source, shards, indices, np.zeros(real, np.int64), 0
        )
        batch.samples = {self.source: 0}
        for i in range(stop - start + dummies):
            meta = self._fill(batch, i, int(shards[i]), int(indices[i])) if i < real else None
            batch.meta.append(meta or {"key": None, "caption": None, "json": {}})
        return batch

    def close(self) -> None:
        """Close the files that are open for reading."""
        self._rows.close()

    def _fill(self, batch: Batch, i: int, shard: int, index: int) -> dict[str, Any] | None:
        """Build row i of the batch and return its meta; None if the sample is unusable."""
        images = batch.fields.get("pixels")
        out = None if images is None else images[i]
        try:
            row = self._rows.make(self.source, shard, index, None, out, with_meta=True)
        except ContentError as error:
            reasons = batch.skipped.setdefault(self.source, {})
            reasons[error.reason] = reasons.get(error.reason, 0) + 1
            place = {"step": batch.step, "row": batch.start + i}
            batch.bad.append(place | self._rows.bad_sample_record(self.source, shard, index, error))
            if out is not None:
                out[...] = 0  # the image may have been decoded before its caption was rejected
            return None
        self._rows.fill_row(batch, i, row)
        batch.samples[self.source] += 1
        path = self.manifests[self.source].paths[shard]
        row_digest = digest.row_digest(
            self.spec.name, batch.start + i, self.source, path, index, 0, 0, row.crop, row.text.choice
        )
        batch.batch_digest = batch.order_digest = digest.add(batch.batch_digest, row_digest)
        return row.meta
