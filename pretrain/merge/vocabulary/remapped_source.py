"""`RemappedSource`: a WeightSource with other embedding rows: permuted, taken from other models, or means of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from pretrain.weights.dtypes import DTYPES, TensorInfo, elements, narrow
from pretrain.weights.source import WeightSource

MEAN = -1  # owner of a row that is a mean of other rows
ELEMENTS_PER_STEP = 1 << 20


@dataclass(frozen=True)
class RowMap:
    """Origin of each row of an output tensor: output row i is row `row[i]` of source `owner[i]`.

    starts: first output rows of the runs that are contiguous in one source.
    means:  output row whose owner is MEAN -> the (owner, row) pairs that it averages. An empty tuple gives zeros; None
            gives the mean of all rows of this tensor except those with None.
    """

    owner: np.ndarray  # int64[rows]
    row: np.ndarray  # int64[rows]
    starts: np.ndarray  # int64[runs]
    means: Mapping[int, tuple[tuple[int, int], ...] | None] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        owner: np.ndarray,
        row: np.ndarray,
        means: Mapping[int, tuple[tuple[int, int], ...] | None] | None = None,
    ) -> RowMap:
        """Build a map and its runs from owner and row of each output row."""
        breaks = (np.diff(row) != 1) | (np.diff(owner) != 0) | (owner[1:] == MEAN)
        starts = np.concatenate([[0], np.flatnonzero(breaks) + 1]).astype(np.int64)
        return cls(owner, row, starts, means or {})

    @property
    def digest(self) -> str:
        """xxh64 of the whole map."""
        means = repr(sorted(self.means.items())).encode()
        return xxhash.xxh64_hexdigest(self.owner.tobytes() + self.row.tobytes() + means)


class RemappedSource(WeightSource):
    """A source whose embeddings and heads (the tensors in `rows`) are read row by row through a RowMap.

    sources:      the sources that `RowMap.owner` indexes.
    rows:         tensor name -> row map; other tensors are read unchanged.
    companions:   replace those of `source`.
    notes:        added to those of `source`.
    config_error: the reason why an output cannot use these companions; None if it can use them.
    """

    def __init__(
        self,
        source: WeightSource,
        sources: Sequence[WeightSource],
        rows: Mapping[str, RowMap],
        companions: Mapping[str, Path | bytes],
        notes: Sequence[str],
        config_error: str | None,
    ) -> None:
        self.__dict__.update(source.__dict__)
        self.config_error = config_error or source.config_error
        self.__dict__["_companions_and_notes"] = dict(companions), [*source.notes, *notes]
        self._source, self._sources, self._rows = source, sources, dict(rows)
        self.rows_digest = " ".join(
            [source.rows_digest, *(f"{name} {row_map.digest}" for name, row_map in rows.items())]
        ).strip()
        self._means: dict[str, np.ndarray] = {}

    @classmethod
    def with_companions(cls, source: WeightSource, companions: Mapping[str, Path | bytes]) -> RemappedSource:
        """The same weights with other companions."""
        return cls(source, [], {}, companions, [], None)

    def info(self, name: str) -> TensorInfo:
        dtype, shape = self._source.info(name)
        return (dtype, (len(self._rows[name].row), *shape[1:])) if name in self._rows else (dtype, shape)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        if name not in self._rows:
            return self._source.read(name, start, stop)
        rows, (dtype, shape) = self._rows[name], self.info(name)
        width = elements(shape[1:])
        out = np.empty(stop - start, DTYPES[dtype])
        at = start
        run = int(np.searchsorted(rows.starts, start // max(1, width), side="right")) - 1
        while at < stop:
            first = int(rows.starts[run])
            last = int(rows.starts[run + 1]) if run + 1 < len(rows.starts) else shape[0]
            end = min(stop, last * width)
            if int(rows.owner[first]) == MEAN:
                part = self._mean(name, first)[at - first * width : end - first * width]
            else:
                shift = (int(rows.row[first]) - first) * width
                source = self._sources[int(rows.owner[first])]
                part = source.read(stored_name(source, name), at + shift, end + shift)
            if end - at == stop - start:
                return part
            out[at - start : end - start] = part
            at, run = end, run + 1
        return out

    def _mean(self, name: str, number: int) -> np.ndarray:
        """One row in the storage type: the mean computed in fp64, rounded once."""
        dtype, shape = self.info(name)
        width, places = elements(shape[1:]), self._rows[name].means[number]
        if places is None:
            if name not in self._means:
                self._means[name] = narrow(self._mean_of_all(name, width), dtype)
            return self._means[name]
        total = np.zeros(width)
        for owner, row in places:
            source = self._sources[owner]
            total += _wide(source.read(stored_name(source, name), row * width, (row + 1) * width), dtype)
        return narrow(total / max(1, len(places)), dtype)

    def _mean_of_all(self, name: str, width: int) -> np.ndarray:
        """The fp64 mean of all rows except those with None in `means`."""
        rows = self._rows[name]
        means = {number for number, places in rows.means.items() if places is None}
        count = len(rows.row) - len(means)
        assert means == set(range(count, count + len(means)))
        total = np.zeros(width)
        step = max(1, ELEMENTS_PER_STEP // max(1, width))
        for at in range(0, count, step):
            end = min(at + step, count)
            block = _wide(self.read(name, at * width, end * width), self.info(name)[0])
            total += block.reshape(end - at, width).sum(axis=0)
        return total / max(1, count)


def stored_name(source: WeightSource, name: str) -> str:
    """The name under which a source stores a tensor, which differs from `name` if the tensor is tied."""
    return source.tied.get(name, name)


def _wide(flat: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.astype(np.float64)
