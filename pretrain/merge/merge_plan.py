"""What a merge will do, as pure data: every tensor, where it comes from, its weights, its place in the output files."""

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
# The others are for mergekit's files.
METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties")
BASED = ("task_arithmetic", "ties", "dare_linear", "dare_ties")
"""methods that add differences to a base"""

Why = Literal["mixed", "rest", "frozen", "integer", "excluded", "rule", "layer"]
Option = float | bool | int | str
Options = tuple[tuple[str, Option], ...]


@dataclass(frozen=True)
class Term:
    """One tensor of one source, and how much of it.

    source:  index into the plan's addresses.
    name:    the tensor's name in that source.
    weight:  resolved: what the method multiplies with.
    density: share of the entries that TIES and DARE keep.
    """

    source: int
    name: str
    weight: float = 1.0
    density: float = 1.0


@dataclass(frozen=True)
class TensorJob:
    """One tensor of the output.

    dtype, shape: of the output; dtype as safetensors spells it.
    method:  "copy" (the bytes of the only term) or the method that combines the terms.
    terms:   in the order in which they are added; none has weight 0.
    base:    what TIES, DARE and task arithmetic add to.
    options: `t` (slerp: the share of the second term), `lambda`, `normalize` (of TIES and DARE-TIES, which divide at
             each entry by the weights that agree), `rescale`, `seed`; sorted by name.
    why:     mixed, or why it is not: rest, frozen, integer, excluded, rule, layer (of a passthrough).
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
    why: Why
    file: int
    offset: int

    @property
    def copy(self) -> bool:
        """Whether the output has the stored bytes of the only term."""
        return self.method == "copy"

    @property
    def reads(self) -> tuple[Term, ...]:
        """Every tensor that is read, the base last."""
        return self.terms if self.base is None else (*self.terms, self.base)

    @property
    def size(self) -> int:
        """Bytes in the output."""
        return elements(self.shape) * DTYPES[self.dtype].itemsize

    def option(self, name: str, default: Option) -> Option:
        """The option of that name."""
        return dict(self.options).get(name, default)


@dataclass(frozen=True)
class OutputFile:
    """One file of the output: its header is final before any tensor is written."""

    name: str
    header: bytes
    size: int  # in bytes, header included


@dataclass(frozen=True)
class Plan:
    """A whole merge; the writer does what stands here and decides nothing.

    addresses:  of every source; the first `inputs` of them are merged, after them stand base and sources of copies.
    weights:    of the inputs, where no rule says otherwise.
    asked:      the request, as it would stand in a spec.
    files:      output files in order; `index` is the content of model.safetensors.index.json, None for one file.
    frozen:     a frozen.safetensors that the output shares with its inputs.
    left_out:   names that stand in an input and not in the output.
    tied:       name -> the name under which the same weight is stored.
    companions: file name -> the file to copy, or its content.
    stage_dir:  whose resolved.yaml describes the model.
    notes:      what a person should know before they start.
    rows:       of every source a digest of the rows in which its embeddings are seen, where a vocabulary rule says so.
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
        """Bytes of the output's tensors and headers."""
        return sum(file.size for file in self.files)

    def key(self, hashes: Sequence[dict[str, str]]) -> str:
        """16 hex digits that change with anything that changes the output; `hashes`: of each source's files."""
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
    """A, B, ... Z, then I27, I28, ..."""
    return chr(ord("A") + index) if index < 26 else f"I{index + 1}"
