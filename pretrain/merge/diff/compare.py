"""What changed between two models: the distance of every tensor, of modules, and of layers; nothing is written."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pretrain.merge.diff.distance import Distance, distance, total
from pretrain.merge.figures import table
from pretrain.merge.merge_plan import Term
from pretrain.merge.methods.blocks import Workers
from pretrain.weights.dtypes import FLOATS, elements
from pretrain.weights.source import WeightSource, open_weights, same_tensor

FIGURES = ("elements", "relative_l2", "cosine", "max_abs", "sign_agreement", "equal", "not_finite")


@dataclass(frozen=True)
class Place:
    """Where a tensor's name stands: model.layers.7.mlp.up.weight is `mlp.up` of layer 7 in `model.layers`.

    stack, layer: empty and None outside of layers.
    part:         the module within the layer, without the parameter's own name.
    """

    stack: str
    layer: int | None
    part: str


@dataclass(frozen=True)
class Row:
    """One tensor of both models."""

    name: str
    dtypes: tuple[str, str]
    shape: tuple[int, ...]
    distance: Distance


@dataclass(frozen=True)
class Diff:
    """Two models side by side.

    rows:     tensors of both, in the order of the first model.
    only_a, only_b: names that one of them has.
    reshaped: name -> both shapes.
    opaque:   name -> whether the bytes are the same, of 8-bit floats, which are not compared as numbers.
    """

    a: str
    b: str
    rows: tuple[Row, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    opaque: dict[str, bool] = field(default_factory=dict)

    @cached_property
    def numbers(self) -> tuple[Row, ...]:
        """What is summed: floats. A counter or positions in a buffer would outweigh every weight."""
        floats = tuple(row for row in self.rows if set(row.dtypes) <= set(FLOATS))
        return floats or self.rows

    @property
    def total(self) -> Distance:
        return total(row.distance for row in self.numbers)

    @property
    def same(self) -> bool:
        """Whether both hold the same tensors with the same values."""
        every = all(row.distance.equal == row.distance.count for row in self.rows)
        return every and not (self.only_a or self.only_b or self.reshaped) and all(self.opaque.values())

    def farthest(self, count: int) -> list[Row]:
        """The tensors with the largest relative distance, largest first; last those that are 0 in A."""
        return sorted(self.numbers, key=lambda row: (_nearness(row.distance), row.name))[:count]

    def modules(self, depth: int) -> dict[str, Distance]:
        """Sums over tensors of the same module (see module_of)."""
        return grouped(self.numbers, lambda row: module_of(self.places[row.name], depth))

    @cached_property
    def places(self) -> dict[str, Place]:
        return places_of([row.name for row in self.rows])

    def plain(self, depth: int) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        return {
            "a": self.a,
            "b": self.b,
            "total": self.total.plain(),
            "modules": {name: one.plain() for name, one in self.modules(depth).items()},
            "tensors": [
                {"name": r.name, "dtypes": list(r.dtypes), "shape": list(r.shape), **r.distance.plain()}
                for r in self.rows
            ],
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "shapes": {name: [list(one), list(two)] for name, (one, two) in self.reshaped.items()},
            "8-bit floats, same bytes": self.opaque,
        }


def diff(
    a: str,
    b: str,
    *,
    run_dir: Path | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Diff:
    """Compare two addresses, tensor by tensor, in constant memory. `progress` is told the elements compared.

    Other names and other shapes are told, not refused. Raises UserError for what cannot be opened.
    """
    return compared(open_weights(a, run_dir), open_weights(b, run_dir), threads, progress)


def compared(
    one: WeightSource,
    two: WeightSource,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Diff:
    """`diff` of what is open already."""
    held = set(two.names())
    names = [name for name in one.names() if name in held]
    rows: list[Row] = []
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    opaque: dict[str, bool] = {}
    with Workers([one, two], threads=threads) as workers:
        for name in names:
            (dtype, shape), (other, theirs) = one.info(name), two.info(name)
            if shape != theirs:
                reshaped[name] = shape, theirs
            elif dtype.startswith("F8") or other.startswith("F8"):
                opaque[name] = same_tensor(one, name, two, name)
            else:
                found = distance(Term(0, name), Term(1, name), workers)
                rows.append(Row(name, (dtype, other), shape, found))
            if progress is not None:
                progress(elements(shape))
    mine = set(names)
    return Diff(
        one.address,
        two.address,
        tuple(rows),
        tuple(name for name in one.names() if name not in mine),
        tuple(name for name in two.names() if name not in mine),
        reshaped,
        opaque,
    )


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, Distance]:
    """Sums over the rows with the same key, in the order in which keys first come."""
    parts: dict[Any, list[Distance]] = {}
    for row in rows:
        parts.setdefault(key(row), []).append(row.distance)
    return {name: total(found) for name, found in parts.items()}


def places_of(names: Sequence[str]) -> dict[str, Place]:
    """Where each name stands. The layer is the first number that a module follows and that has others beside it."""
    numbers: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for at in _numbers(parts):
            numbers.setdefault(".".join(parts[:at]), set()).add(parts[at])
    return {name: _place(name.split("."), numbers) for name in names}


def _place(parts: list[str], numbers: dict[str, set[str]]) -> Place:
    at = next((i for i in _numbers(parts) if len(numbers[".".join(parts[:i])]) > 1), None)
    if at is None:
        return Place("", None, ".".join(parts[:-1]) or parts[0])
    return Place(".".join(parts[:at]), int(parts[at]), _starred(parts[at + 1 : -1]))


def _numbers(parts: Sequence[str]) -> list[int]:
    return [i for i, part in enumerate(parts[:-2]) if part.isdecimal()]


def _nearness(one: Distance) -> tuple[bool, float]:
    """Sorts the largest relative distance first, and what has none, being 0 in A, last."""
    return math.isinf(one.relative), -one.relative


def _starred(parts: Sequence[str]) -> str:
    return ".".join("*" if part.isdecimal() else part for part in parts)


def module_of(place: Place, depth: int) -> str:
    """The first `depth` components of a module's name, of which a stack of layers is one: model.layers.*"""
    if place.layer is None:
        return ".".join(place.part.split(".")[:depth])
    return ".".join([f"{place.stack}.*" if place.stack else "*", *place.part.split(".")[: depth - 1]])


def lines(found: Diff, depth: int, top: int) -> list[str]:
    """The comparison for people: modules, then the tensors that are farthest apart, then what cannot be compared."""
    if not found.rows:
        return [f"A  {found.a}", f"B  {found.b}", "no tensor to compare", *_others(found)]
    heads = ("", "elements", "|B-A|/|A|", "cosine", "max |B-A|", "same sign", "equal")
    whole = found.total
    rows = [f"A  {found.a}", f"B  {found.b}"]
    if found.same:
        rows.append(f"the same: {len(found.rows)} tensors, {whole.count:,} elements, all of them equal")
        return rows
    modules = sorted(found.modules(depth).items(), key=lambda item: (_nearness(item[1]), item[0]))
    rows += ["", *table(("module", *heads[1:]), [_cells(n, d) for n, d in [*modules, ("all", whole)]])]
    if top:
        rows += [
            "",
            *table(("tensor", *heads[1:]), [_cells(r.name, r.distance) for r in found.farthest(top)]),
        ]
        left = len(found.numbers) - top
        rows += [f"... and {left} more (--top, --csv, --json)"] if left > 0 else []
    return rows + _others(found)


def as_csv(found: Diff, depth: int) -> str:
    """A row a tensor, with the module it is counted in."""
    made = io.StringIO()
    writer = csv.writer(made, lineterminator="\n")
    writer.writerow(("name", "module", "dtype_a", "dtype_b", "shape", *FIGURES))
    for row in found.rows:
        figures = row.distance.plain()
        shape = "x".join(map(str, row.shape))
        cells = ["" if figures[name] is None else figures[name] for name in FIGURES]
        writer.writerow((row.name, module_of(found.places[row.name], depth), *row.dtypes, shape, *cells))
    return made.getvalue()


def _cells(name: str, one: Distance) -> tuple[str, ...]:
    return (
        name,
        f"{one.count:,}",
        f"{one.relative:.3g}" if math.isfinite(one.relative) else "A is 0",
        "-" if one.cosine is None else f"{one.cosine:.6f}",
        f"{one.max_abs:.3g}",
        f"{one.sign_agreement:.2%}",
        f"{one.equal_share:.2%}",
    )


def _others(found: Diff) -> list[str]:
    """What cannot be compared, and what is not finite."""
    rows = _alike("only in A", found.only_a) + _alike("only in B", found.only_b)
    rows += [f"shape: {n}  {list(one)} in A, {list(two)} in B" for n, (one, two) in found.reshaped.items()]
    summed = {row.name for row in found.numbers}
    counted = [row for row in found.rows if row.name not in summed]
    rows += [f"integer: {row.name}  {_unequal(row.distance)}" for row in counted]
    rows += [f"8-bit: {n}  {'the same bytes' if s else 'other bytes'}" for n, s in found.opaque.items()]
    bad = [(r.name, r.distance.count - r.distance.compared) for r in found.rows]
    rows += [
        f"not finite: {name}  {count:,} elements, left out of the figures" for name, count in bad if count
    ]
    return ["", *rows] if rows else []


def _unequal(one: Distance) -> str:
    if one.equal == one.count:
        return f"{one.count:,} elements, all equal; in no sum"
    return f"{one.count - one.equal:,} of {one.count:,} elements differ; in no sum"


def _alike(what: str, names: Sequence[str]) -> list[str]:
    """One line for names that differ in their numbers alone."""
    counts = Counter(_starred(name.split(".")) for name in names)
    one = {_starred(name.split(".")): name for name in names}
    return [f"{what}: {k} ({n} tensors)" if n > 1 else f"{what}: {one[k]}" for k, n in counts.items()]
