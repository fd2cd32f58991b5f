"""One pass over a held-out source in manifest order, without random crops, in batches of equal size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipeline.batches.batch_builder import open_sources
from data_pipeline.batches.row_builder import RowBuilder
from data_pipeline.batches.spec import Batch, StreamSpec
from data_pipeline.errors import ContentError, UserError
from data_pipeline.order import digest
from data_pipeline.order.stream_order import row_keys, sample_ids
from data_pipeline.sources.manifest import Manifest
from data_pipeline.storage.cache import CacheSettings
from data_pipeline.transforms.tokenizers import Tokenizer, load_tokenizer


class EvaluationPass:
    """Batches of a stream with one source; `len()` of them. The last is padded with rows of weight 0.

    What is read of an object store goes through `cache`, by default the node's in its default place.
    An unusable sample keeps its place with weight 0 and is counted: no other counts twice in its stead.
    """

    def __init__(
        self,
        spec: StreamSpec,
        manifests: Mapping[str, Manifest] | None = None,
        tokenizer: Tokenizer | None = None,
        cache: CacheSettings | None = None,
    ) -> None:
        if len(spec.sources) != 1:
            raise UserError(f"evaluation {spec.name}: one source is expected, not {', '.join(spec.sources)}")
        self.spec = spec
        self.source = next(iter(spec.sources))
        self.manifests = dict(open_sources(spec) if manifests is None else manifests)
        self.tokenizer = load_tokenizer(spec.text.tokenizer) if spec.text and tokenizer is None else tokenizer
        self._rows = RowBuilder(spec, self.manifests, self.tokenizer, cache or CacheSettings.of())
        self._ends = np.cumsum(self.manifests[self.source].counts)

    @property
    def samples(self) -> int:
        return int(self._ends[-1])

    def __len__(self) -> int:
        return -(-self.samples // self.spec.largest)

    def check(self) -> None:
        """Raise UserError if the first samples are all unusable."""
        self._rows.check(self.source)

    def make(self, number: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of batch `number`; `meta` holds each row's key, caption and json member."""
        batch = self._rows.empty_batch(number, start, stop)
        batch.meta = []
        place = number * self.spec.largest + np.arange(start, stop, dtype=np.int64)
        real = int((place < self.samples).sum())
        shards = np.searchsorted(self._ends, place[:real], side="right").astype(np.int64)
        indices = place[:real] - (self._ends - self.manifests[self.source].counts)[shards]
        indices = self.manifests[self.source].in_tar(shards, indices)
        batch.sample_ids[:real] = sample_ids(self.source, shards, indices)
        batch.row_keys[:real] = row_keys(
            self.spec.seed, self.source, shards, indices, np.zeros(real, np.int64), 0
        )
        batch.weights[:] = 0
        batch.samples = {self.source: 0}
        for i in range(stop - start):
            meta = self._put(batch, i, int(shards[i]), int(indices[i])) if i < real else None
            batch.meta.append(meta or {"key": None, "caption": None, "json": {}})
        return batch

    def close(self) -> None:
        self._rows.close()

    def _put(self, batch: Batch, i: int, shard: int, index: int) -> dict[str, Any] | None:
        out = None if batch.pixels is None else batch.pixels[i]
        try:
            row = self._rows.make(self.source, shard, index, None, out)
        except ContentError as verdict:
            reasons = batch.skipped.setdefault(self.source, {})
            reasons[verdict.reason] = reasons.get(verdict.reason, 0) + 1
            place = {"step": batch.step, "row": batch.start + i}
            batch.bad.append(place | self._rows.bad_sample_record(self.source, shard, index, verdict))
            if out is not None:
                out[...] = 0  # its caption may have been what is wrong
            return None
        self._rows.fill_row(batch, i, row)
        batch.weights[i] = 1
        batch.samples[self.source] += 1
        path = self.manifests[self.source].paths[shard]
        one = digest.row_digest(
            self.spec.name, batch.start + i, self.source, path, index, 0, 0, row.crop, row.choice
        )
        batch.batch_digest = batch.order_digest = digest.add(batch.batch_digest, one)
        return row.meta
