"""What a merge will do, as pure data: every tensor, where it comes from, its weights, its place in the output file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import xxhash

from data_pipeline.errors import UserError
from pretrain.merge.methods import FLOATS
from pretrain.merge.safetensors_io import DTYPES, Info, layout
from pretrain.merge.sources import FROZEN, WeightSource, nbytes

OUTPUT = "model.safetensors"
LISTED = 200

Why = Literal["mixed", "rest", "frozen", "integer"]


@dataclass(frozen=True)
class TensorJob:
    """One tensor of the output: sum of weight x input, or (`copy`) the bytes of its only input."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    weights: tuple[float, ...]
    copy: bool
    why: Why
    offset: int  # in bytes, in the output file


@dataclass(frozen=True)
class Plan:
    """A whole merge; the writer does what stands here and decides nothing."""

    addresses: tuple[str, ...]
    weights: tuple[float, ...]
    only: str | None
    rest: int | None
    jobs: tuple[TensorJob, ...]
    header: bytes
    frozen: Path | None  # a frozen.safetensors that the output shares with its inputs
    left_out: tuple[str, ...]
    tied: dict[str, str]
    companions: dict[str, Path]
    stage_dir: Path | None  # whose resolved.yaml describes the model

    @property
    def size(self) -> int:
        """Bytes of the output file."""
        return max([len(self.header), *(job.offset + nbytes((job.dtype, job.shape)) for job in self.jobs)])

    def key(self, hashes: Sequence[dict[str, str]]) -> str:
        """16 hex digits that change with anything that changes the output; `hashes`: of each input's files."""
        jobs = [[j.name, j.dtype, j.shape, j.inputs, [w.hex() for w in j.weights], j.copy] for j in self.jobs]
        parts = [hashes, jobs, self.left_out, sorted(self.companions), self.frozen is not None]
        return xxhash.xxh64(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def lines(self) -> list[str]:
        """The plan for people: one line a tensor, and the sums."""
        letters = [letter(i) for i in range(len(self.addresses))]
        rows = [f"{mark}  {a}" for mark, a in zip(letters, self.addresses, strict=True)]
        rows.append("theta = " + formula(letters, self.weights))
        for job in self.jobs:
            what = f"copy of {letters[job.inputs[0]]} ({job.why})" if job.copy else ""
            what = what or " + ".join(
                f"{w:g} {letters[i]}" for i, w in zip(job.inputs, job.weights, strict=True)
            )
            rows.append(f"  {job.name}  {job.dtype} {list(job.shape)}  {what}")
        if self.frozen is not None:
            rows.append(f"  {FROZEN}: shared with {self.frozen}")
        rows += [f"  left out: {name}" for name in self.left_out]
        rows += [f"  {name}: tied to {to}" for name, to in self.tied.items()]
        mixed = sum(job.why == "mixed" for job in self.jobs)
        rows.append(
            f"{mixed} tensors mixed, {len(self.jobs) - mixed} copied, {self.size:,} bytes in {OUTPUT}"
        )
        return rows


@dataclass(frozen=True)
class _Slot:
    """A tensor of the output before the weights are known; `origin`: the one input it is copied from."""

    name: str
    info: Info
    why: Why
    origin: int | None


class Planner:
    """Decides once for a set of inputs what is mixed, copied, left out; then plans any weights.

    `rest`: index of the source that everything not mixed comes from. `active`: inputs whose weight is not zero in
    at least one plan; the others' data are never read. `dtype`: type of the mixed tensors, default the inputs' own.
    Raises one UserError with every mismatch: missing, extra, shape, dtype, unequal tensors nobody was named for.
    """

    def __init__(
        self,
        sources: Sequence[WeightSource],
        inputs: int,
        *,
        only: str | None = None,
        rest: int | None = None,
        active: Sequence[int] | None = None,
        dtype: str | None = None,
    ) -> None:
        if dtype is not None and dtype not in FLOATS:
            raise UserError(f"dtype {dtype!r}: choose one of {', '.join(FLOATS)}")
        self.sources, self.inputs, self.only, self.rest, self.dtype = sources, inputs, only, rest, dtype
        self._active = list(active) if active else list(range(inputs))
        try:
            self._only = re.compile(only) if only is not None else None
        except re.error as error:
            raise UserError(f"only: {only!r} is no regular expression: {error}") from None
        self._held = [set(source.names()) for source in sources]
        self._problems: list[str] = []
        self._left_out: list[str] = []
        self._slots: list[_Slot] = []
        order = [rest, *range(inputs)] if rest is not None else list(range(inputs))
        for name in dict.fromkeys(name for i in order for name in sources[i].names()):
            self._decide(name)
        if not any(slot.why == "mixed" for slot in self._slots) and not self._problems:
            found = f"matches {only!r}" if only is not None else "could be mixed"
            self._problems.append(f"no tensor {found}")
        if self._problems:
            raise UserError(self._message())
        self._frozen = self._shared_frozen()

    def plan(self, weights: Sequence[float]) -> Plan:
        """`weights`: one for each input, as resolved by `resolve_weights`."""
        nonzero = [i for i in range(self.inputs) if weights[i] != 0]
        main = self.rest if self.rest is not None else nonzero[0]
        linked = set() if self._frozen is None else {s.name for s in self._slots if self._is_frozen(s)}
        slots = [slot for slot in self._slots if slot.name not in linked]
        header, offsets = layout({s.name: self._stored(s) for s in slots}, {"format": "pt"})
        jobs = []
        for slot in sorted(slots, key=lambda slot: offsets[slot.name]):
            dtype, shape = self._stored(slot)
            inputs: tuple[int, ...] = tuple(nonzero)
            if slot.origin is not None or slot.why != "mixed":
                inputs = (slot.origin if slot.origin is not None else nonzero[0],)
            terms = tuple(float(weights[i]) for i in inputs) if slot.why == "mixed" else (1.0,)
            copy = slot.why != "mixed" or (
                terms == (1.0,) and self.sources[inputs[0]].info(slot.name)[0] == dtype
            )
            jobs.append(TensorJob(slot.name, dtype, shape, inputs, terms, copy, slot.why, offsets[slot.name]))
        present = {slot.name for slot in self._slots}
        tied = self.sources[main].tied
        return Plan(
            addresses=tuple(source.address for source in self.sources),
            weights=tuple(float(weight) for weight in weights),
            only=self.only,
            rest=self.rest,
            jobs=tuple(jobs),
            header=header,
            frozen=self._frozen,
            left_out=tuple(self._left_out),
            tied={name: to for name, to in tied.items() if to in present and name not in present},
            companions=self.sources[main].companions,
            stage_dir=self.sources[main].located.stage_dir,
        )

    def _stored(self, slot: _Slot) -> Info:
        return (self.dtype or slot.info[0], slot.info[1]) if slot.why == "mixed" else slot.info

    def _decide(self, name: str) -> None:
        holders = [i for i in range(self.inputs) if name in self._held[i]]
        if self._only is not None and not self._only.search(name):
            if self.rest is not None:
                self._from_rest(name, "rest")
            else:
                self._same_everywhere(name, holders, "rest", "outside only")
        elif len(holders) < self.inputs:
            if self.rest is not None:
                self._from_rest(name, "rest")
            else:
                self._missing(name, holders)
        elif all(name in source.frozen for source in self.sources[: self.inputs]):
            if self.rest is not None:
                self._from_rest(name, "frozen")
            else:
                self._same_everywhere(name, holders, "frozen", "frozen")
        else:
            self._mix(name)

    def _mix(self, name: str) -> None:
        infos = [self.sources[i].info(name) for i in range(self.inputs)]
        if len({shape for _, shape in infos}) > 1:
            shapes = ", ".join(f"{list(s)} in {self._name(i)}" for i, (_, s) in enumerate(infos))
            self._problems.append(f"{name}: shape {shapes}")
            return
        dtypes = [dtype for dtype, _ in infos]
        floats = all(dtype in FLOATS for dtype in dtypes)
        if len(set(dtypes)) > 1 and not (floats and self.dtype):
            listed = ", ".join(f"{d} in {self._name(i)}" for i, d in enumerate(dtypes))
            hint = "; --dtype says which to write" if floats else ""
            self._problems.append(f"{name}: dtype {listed}{hint}")
        elif floats:
            self._slots.append(_Slot(name, infos[0], "mixed", None))
        elif any(dtype.startswith("F8") for dtype in dtypes):
            self._problems.append(f"{name}: dtype {dtypes[0]} cannot be mixed; exclude it with --only")
        elif self.rest is not None:
            self._from_rest(name, "integer")
        else:
            self._slots.append(_Slot(name, infos[0], "integer", None))

    def _from_rest(self, name: str, why: Why) -> None:
        assert self.rest is not None
        if name in self._held[self.rest]:
            self._slots.append(_Slot(name, self.sources[self.rest].info(name), why, self.rest))
        else:
            self._left_out.append(name)

    def _same_everywhere(self, name: str, holders: Sequence[int], why: Why, what: str) -> None:
        if len(holders) < self.inputs:
            self._missing(name, holders)
            return
        first = self._active[0]
        for other in self._active[1:]:
            if not self.sources[first].equal(name, self.sources[other]):
                self._problems.append(
                    f"{name}: {what}, and differs between {self._name(first)} and {self._name(other)}; "
                    "--copy-rest says whose to take"
                )
                return
        self._slots.append(_Slot(name, self.sources[first].info(name), why, first))

    def _missing(self, name: str, holders: Sequence[int]) -> None:
        absent = [i for i in range(self.inputs) if i not in holders]
        where = ", ".join(self._name(i) for i in absent)
        tie = next((self.sources[i].tied[name] for i in absent if name in self.sources[i].tied), None)
        note = f" (there it is tied to {tie})" if tie else ""
        self._problems.append(f"{name}: only in {self._name(holders[0])}, missing in {where}{note}")

    def _is_frozen(self, slot: _Slot) -> bool:
        return slot.origin is not None and slot.name in self.sources[slot.origin].frozen

    def _shared_frozen(self) -> Path | None:
        """A frozen.safetensors of which the output takes every tensor, so that it need not be written again."""
        origins = {slot.origin for slot in self._slots if self._is_frozen(slot)}
        if len(origins) != 1:
            return None
        source = self.sources[origins.pop() or 0]
        taken = {slot.name for slot in self._slots if self._is_frozen(slot)}
        return source.frozen_file if taken == source.frozen else None

    def _name(self, index: int) -> str:
        return f"{letter(index)} ({self.sources[index].address})"

    def _message(self) -> str:
        names = " and ".join(self._name(i) for i in range(self.inputs))
        listed = "".join(f"\n  {problem}" for problem in self._problems[:LISTED])
        more = len(self._problems) - LISTED
        return (
            f"cannot merge {names}, {len(self._problems)} mismatches:{listed}"
            + (f"\n  ... and {more} more" if more > 0 else "")
            + "\n--only narrows what is mixed, --copy-rest says from whom the rest is taken"
        )


def letter(index: int) -> str:
    """A, B, ... Z, then I27, I28, ..."""
    return chr(ord("A") + index) if index < 26 else f"I{index + 1}"


def formula(letters: Sequence[str], weights: Sequence[float]) -> str:
    return " + ".join(f"{w:g} x {mark}" for mark, w in zip(letters, weights, strict=False))


def resolve_weights(count: int, beta: float | None, weights: Sequence[float] | None) -> tuple[float, ...]:
    """fp64 weights of `count` inputs: (beta, 1 - beta) for two, or shares divided by their sum.

    Shares that add up to 1 within 1e-9 are taken as they are.
    """
    if (beta is None) == (weights is None):
        raise UserError(
            "say how much of each input: --beta for two inputs, or --weights with one number for each"
        )
    if beta is not None:
        if count != 2:
            raise UserError(
                f"--beta is for two inputs, here are {count}; write --weights with {count} numbers"
            )
        if not 0 <= beta <= 1:
            raise UserError(
                f"--beta {beta:g}: between 0 and 1; to extrapolate write --weights {beta:g},{1 - beta:g}"
            )
        return (float(beta), 1.0 - float(beta))
    shares = [float(weight) for weight in weights or ()]
    if len(shares) != count:
        raise UserError(f"{len(shares)} weights for {count} inputs; write one for each")
    total = math.fsum(shares)
    if not all(math.isfinite(share) for share in shares) or abs(total) < 1e-9:
        raise UserError(f"weights {', '.join(f'{s:g}' for s in shares)}: finite numbers whose sum is not 0")
    return tuple(shares) if abs(total - 1) <= 1e-9 else tuple(share / total for share in shares)


def check_dtype(dtype: str | None) -> str | None:
    """`bf16`, `float32`, `BF16` -> as safetensors spells it."""
    if dtype is None:
        return None
    names = {
        "BFLOAT16": "BF16",
        "FLOAT16": "F16",
        "FP16": "F16",
        "FLOAT32": "F32",
        "FP32": "F32",
        "FP64": "F64",
    }
    found = names.get(dtype.upper(), dtype.upper())
    if found not in FLOATS or found not in DTYPES:
        raise UserError(f"--dtype {dtype}: choose one of bf16, fp16, fp32")
    return found
