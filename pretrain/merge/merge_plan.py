"""`Plan`, `TensorJob`, `Term`: a merge as pure data.

A plan states for every output tensor its inputs, its weights and its position in the output files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import xxhash

from pretrain.weights.dtypes import DTYPES, elements

Method = Literal[
    "copy", "linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties",
    "nuslerp", "multislerp", "karcher", "model_stock", "sce",
]  # fmt: skip
# Methods of dromos specs and flags; the other values of `Method` are only available in mergekit files.
METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties")
# Those that add differences to a base.
NATIVE_BASE_METHODS = ("task_arithmetic", "ties", "dare_linear", "dare_ties")

Treatment = Literal["mixed", "rest", "frozen", "integer", "excluded", "rule", "layer"]
Option = float | bool | int | str
Options = tuple[tuple[str, Option], ...]


@dataclass(frozen=True)
class Term:
    """One tensor of one source with its weight.

    source:  index into the plan's addresses.
    name:    name of the tensor in that source.
    weight:  resolved factor of the tensor in the method.
    density: fraction of the entries that TIES and DARE keep.
    """

    source: int
    name: str
    weight: float = 1.0
    density: float = 1.0


@dataclass(frozen=True)
class TensorJob:
    """One tensor of the output.

    dtype:   of the output, in safetensors spelling.
    shape:   of the output.
    method:  "copy" (the bytes of the only term) or the method that combines the terms.
    terms:   in the order of addition; no weight is 0.
    base:    the tensor to which TIES, DARE and task arithmetic add differences.
    options: sorted by name: `t` (slerp: weight of the second term), `lambda`, `normalize` (TIES and DARE-TIES divide
             each entry by the sum of the weights that agree in sign), `rescale`, `seed`, ...
    treatment: "mixed", or the reason for a copy: rest, frozen, integer, excluded, rule, layer (of a passthrough).
    file:    index into the plan's files.
    offset:  in bytes from the start of that file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    method: Method
    terms: tuple[Term, ...]
    base: Term | None
    options: Options
    treatment: Treatment
    file: int
    offset: int

    @property
    def copy(self) -> bool:
        """True if the output has the stored bytes of the only term."""
        return self.method == "copy"

    @property
    def reads(self) -> tuple[Term, ...]:
        """All tensors that are read, the base last."""
        return self.terms if self.base is None else (*self.terms, self.base)

    @property
    def size(self) -> int:
        """Size in the output, in bytes."""
        return elements(self.shape) * DTYPES[self.dtype].itemsize

    def option(self, name: str, default: Option) -> Option:
        """The option `name`, or `default` if it is not set."""
        return dict(self.options).get(name, default)


@dataclass(frozen=True)
class OutputFile:
    """One file of the output. The header is final before any tensor is written."""

    name: str
    header: bytes
    size: int  # in bytes, header included


@dataclass(frozen=True)
class Plan:
    """A complete merge. The writer executes it without further decisions.

    addresses:    of all sources: first the `inputs` that are merged, then the base and the sources of copies.
    inputs:       number of inputs.
    weights:      of the inputs, unless a rule overrides them; empty for a mergekit file.
    request:      the request under the keys of a spec; merge.json stores it as `asked`.
    files:        output files in order.
    index:        content of model.safetensors.index.json; None for one file.
    frozen:       a frozen.safetensors that the output shares with its inputs.
    left_out:     names of input tensors that the output does not have.
    tied:         name -> stored name of the same weight.
    companions:   file name -> file to copy, or its content.
    stage_dir:    stage folder whose resolved.yaml describes the model.
    notes:        shown to the user before the merge starts.
    rows_digests: per source, the digest of its embeddings' row maps and the key of its state dict; empty if its
                  rows are read as stored and no key chose among state dicts.
    """

    addresses: tuple[str, ...]
    inputs: int
    method: str
    weights: tuple[float, ...]
    request: dict[str, Any]
    jobs: tuple[TensorJob, ...]
    files: tuple[OutputFile, ...]
    index: bytes | None
    frozen: Path | None
    left_out: tuple[str, ...]
    tied: dict[str, str]
    companions: dict[str, Path | bytes]
    stage_dir: Path | None
    notes: tuple[str, ...] = field(default=())
    rows_digests: tuple[str, ...] = field(default=())

    @property
    def size(self) -> int:
        """Bytes of all output files."""
        return sum(file.size for file in self.files)

    def key(self, hashes: Sequence[dict[str, str]]) -> str:
        """16 hex digits that change whenever the output changes; `hashes`: per source, file name -> content hash."""
        jobs = [
            [
                j.name,
                j.dtype,
                j.shape,
                j.method,
                [_plain(t) for t in j.terms],
                _plain(j.base),
                j.options,
                j.file,
            ]
            for j in self.jobs
        ]
        companions = [
            [n, xxhash.xxh64_hexdigest(c.read_bytes() if isinstance(c, Path) else c)]
            for n, c in sorted(self.companions.items())
        ]
        files = [file.name for file in self.files]
        parts = [hashes, jobs, files, self.left_out, companions, self.rows_digests, self.frozen is not None]
        return xxhash.xxh64(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _plain(term: Term | None) -> list[Any] | None:
    return None if term is None else [term.source, term.name, term.weight.hex(), term.density.hex()]


def letter(index: int) -> str:
    """Letter of an input: A, B, ... Z, then I27, I28, ..."""
    return chr(ord("A") + index) if index < 26 else f"I{index + 1}"
