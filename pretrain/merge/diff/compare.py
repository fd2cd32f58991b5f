"""`dromos diff`: distances of two models by tensor, module and layer; as table, CSV and JSON data.

Tensors are paired by name. Tensors that only one model has, and tensors of different shapes, are listed;
they are no error.
"""

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
from pretrain.weights.renamed import described, renamings
from pretrain.weights.source import WeightSource, open_weights, same_tensor
from pretrain.weights.unusable import adapter_problem, quantised_problem

OPAQUE = ("F8", "C")  # dtypes that begin so are compared by their bytes
MEASURES = ("elements", "relative_l2", "cosine", "max_abs", "sign_agreement", "equal", "not_finite")


@dataclass(frozen=True)
class Place:
    """Position of a tensor in a model: model.layers.7.mlp.up.weight is `mlp.up` of layer 7 in `model.layers`.

    stack, layer: "" and None for tensors outside of layers.
    part:         module within the layer, without the name of the parameter.
    """

    stack: str
    layer: int | None
    part: str


@dataclass(frozen=True)
class Row:
    """One tensor that both models have, with its dtype in each of them."""

    name: str
    dtypes: tuple[str, str]
    shape: tuple[int, ...]
    distance: Distance


@dataclass(frozen=True)
class Diff:
    """The comparison of two models.

    a, b:           addresses.
    rows:           tensors of both models with the same shape, in the order of the first model.
    only_a, only_b: names that only one of the models has.
    reshaped:       name -> its two shapes, if they differ.
    notes:          about tensors that are read otherwise than stored.
    opaque:         name -> True if the bytes are equal, for 8-bit floats and complex numbers, which are not compared
                    as numbers.
    """

    a: str
    b: str
    rows: tuple[Row, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    opaque: dict[str, bool] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @cached_property
    def numbers(self) -> tuple[Row, ...]:
        """The rows that are summed: floats, or all rows if there are no floats.

        Integer counters and position buffers have values so large that they would dominate every sum.
        """
        floats = tuple(row for row in self.rows if set(row.dtypes) <= set(FLOATS))
        return floats or self.rows

    @property
    def total(self) -> Distance:
        """The distance over all tensors in `numbers`."""
        return total(row.distance for row in self.numbers)

    @property
    def same(self) -> bool:
        """True if both models have the same tensors with the same values."""
        equal = all(row.distance.equal == row.distance.count for row in self.rows)
        return equal and not (self.only_a or self.only_b or self.reshaped) and all(self.opaque.values())

    def farthest(self, count: int) -> list[Row]:
        """The tensors with the largest relative distance, largest first; tensors that are 0 in A come last."""
        return sorted(self.numbers, key=lambda row: (_by_distance(row.distance), row.name))[:count]

    def modules(self, depth: int) -> dict[str, Distance]:
        """Module name (see module_of) -> distance over its tensors."""
        return grouped(self.numbers, lambda row: module_of(self.places[row.name], depth))

    @cached_property
    def places(self) -> dict[str, Place]:
        """Tensor name -> place."""
        return places_of([row.name for row in self.rows])

    def plain(self, depth: int) -> dict[str, Any]:
        """The comparison as JSON data, with modules of `depth` name components."""
        return {
            "a": self.a,
            "b": self.b,
            "total": self.total.plain(),
            "modules": {name: distance.plain() for name, distance in self.modules(depth).items()},
            "tensors": [
                {"name": r.name, "dtypes": list(r.dtypes), "shape": list(r.shape), **r.distance.plain()}
                for r in self.rows
            ],
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "shapes": {
                name: [list(shape_a), list(shape_b)] for name, (shape_a, shape_b) in self.reshaped.items()
            },
            "8-bit floats, same bytes": self.opaque,
            "notes": list(self.notes),
        }


def diff(
    a: str,
    b: str,
    *,
    run_dir: Path | None = None,
    key: str | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Diff:
    """Compare the models at two addresses, tensor by tensor, in constant memory.

    key:      of the state dict to read in torch files.
    progress: receives numbers of compared elements.
    Raises UserError for an address that cannot be opened.
    """
    return compare_sources(open_weights(a, run_dir, key), open_weights(b, run_dir, key), threads, progress)


def compare_sources(
    a: WeightSource,
    b: WeightSource,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Diff:
    """`diff` for sources that are open already."""
    if renamed := renamings(b, a):
        b.rename(renamed)
        b.reading.append(f"{b.address}: {described(renamed)}, as in {a.address}")
    names_b = set(b.names())
    common = [name for name in a.names() if name in names_b]
    rows: list[Row] = []
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    opaque: dict[str, bool] = {}
    with Workers([a, b], threads=threads) as workers:
        for name in common:
            (dtype_a, shape_a), (dtype_b, shape_b) = a.info(name), b.info(name)
            if shape_a != shape_b:
                reshaped[name] = shape_a, shape_b
            elif dtype_a.startswith(OPAQUE) or dtype_b.startswith(OPAQUE):
                opaque[name] = same_tensor(a, name, b, name)
            else:
                measured = distance(Term(0, name), Term(1, name), workers)
                rows.append(Row(name, (dtype_a, dtype_b), shape_a, measured))
            if progress is not None:
                progress(elements(shape_a))
    in_both = set(common)
    return Diff(
        a.address,
        b.address,
        tuple(rows),
        tuple(name for name in a.names() if name not in in_both),
        tuple(name for name in b.names() if name not in in_both),
        reshaped,
        opaque,
        (*_cautions(a), *_cautions(b)),
    )


def _cautions(source: WeightSource) -> list[str]:
    """Notes about a source whose tensors say less than they seem to: adapters and codes."""
    adapter, codes = adapter_problem(source), quantised_problem(source)
    notes = [adapter] if adapter is not None else []
    notes += [f"quantised: {codes}"] if codes is not None else []
    return [*source.reading, *(f"{source.address}: {note}" for note in notes)]


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, Distance]:
    """Key -> distance over the rows with that key, in the order in which the keys first occur."""
    groups: dict[Any, list[Distance]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row.distance)
    return {group: total(distances) for group, distances in groups.items()}


def places_of(names: Sequence[str]) -> dict[str, Place]:
    """Tensor name -> place.

    The layer is the first number with a module after it that differs between the names of the model: in
    v.0.blocks.1.mlp.w it is 1 if all names begin with v.0.
    """
    numbers: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for i in _numbers(parts):
            numbers.setdefault(".".join(parts[:i]), set()).add(parts[i])
    return {name: _place(name.split("."), numbers) for name in names}


def _place(parts: list[str], numbers: dict[str, set[str]]) -> Place:
    at = next((i for i in _numbers(parts) if len(numbers[".".join(parts[:i])]) > 1), None)
    if at is None:
        return Place("", None, ".".join(parts[:-1]) or parts[0])
    return Place(".".join(parts[:at]), int(parts[at]), _starred(parts[at + 1 : -1]))


def _numbers(parts: Sequence[str]) -> list[int]:
    """Indices of the numbers in a name that are followed by a module and a parameter."""
    return [i for i, part in enumerate(parts[:-2]) if part.isdecimal()]


def _by_distance(measured: Distance) -> tuple[bool, float]:
    """Sort key: the largest relative distance first; tensors that are 0 in A, whose distance is infinite, last."""
    return math.isinf(measured.relative), -measured.relative


def _starred(parts: Sequence[str]) -> str:
    """The name with `*` in place of numbers."""
    return ".".join("*" if part.isdecimal() else part for part in parts)


def module_of(place: Place, depth: int) -> str:
    """The first `depth` components of a module's name; a stack of layers, such as model.layers.*, counts as one."""
    if place.layer is None:
        return ".".join(place.part.split(".")[:depth])
    return ".".join([f"{place.stack}.*" if place.stack else "*", *place.part.split(".")[: depth - 1]])


def lines(result: Diff, depth: int, top: int) -> list[str]:
    """Lines for the terminal: modules, the `top` tensors with the largest distance, and what was not compared."""
    if not result.rows:
        return [f"A  {result.a}", f"B  {result.b}", "no tensor to compare", *_remarks(result)]
    columns = ("elements", "|B-A|/|A|", "cosine", "max |B-A|", "same sign", "equal")
    overall = result.total
    output = [f"A  {result.a}", f"B  {result.b}"]
    if result.same:
        output.append(f"the same: {len(result.rows)} tensors, {overall.count:,} elements, all of them equal")
        return output + [f"note: {note}" for note in result.notes]
    modules = sorted(result.modules(depth).items(), key=lambda item: (_by_distance(item[1]), item[0]))
    output += ["", *table(("module", *columns), [_cells(n, d) for n, d in [*modules, ("all", overall)]])]
    if top:
        output += [
            "",
            *table(("tensor", *columns), [_cells(r.name, r.distance) for r in result.farthest(top)]),
        ]
        left = len(result.numbers) - top
        output += [f"... and {left} more (--top, --csv, --json)"] if left > 0 else []
    return output + _remarks(result)


def as_csv(result: Diff, depth: int) -> str:
    """CSV with one row per tensor, its module and all digits of every measure."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("name", "module", "dtype_a", "dtype_b", "shape", *MEASURES))
    for row in result.rows:
        measures = row.distance.plain()
        shape = "x".join(map(str, row.shape))
        cells = ["" if measures[name] is None else measures[name] for name in MEASURES]
        writer.writerow((row.name, module_of(result.places[row.name], depth), *row.dtypes, shape, *cells))
    return text.getvalue()


def _cells(name: str, measured: Distance) -> tuple[str, ...]:
    return (
        name,
        f"{measured.count:,}",
        f"{measured.relative:.3g}" if math.isfinite(measured.relative) else "A is 0",
        "-" if measured.cosine is None else f"{measured.cosine:.6f}",
        f"{measured.max_abs:.3g}",
        f"{measured.sign_agreement:.2%}",
        f"{measured.equal_share:.2%}",
    )


def _remarks(result: Diff) -> list[str]:
    """Tensors that were not compared or not summed, and numbers of elements that are not finite."""
    rows = [f"note: {note}" for note in result.notes]
    rows += _grouped_names("only in A", result.only_a) + _grouped_names("only in B", result.only_b)
    rows += [
        f"shape: {n}  {list(shape_a)} in A, {list(shape_b)} in B"
        for n, (shape_a, shape_b) in result.reshaped.items()
    ]
    summed = {row.name for row in result.numbers}
    integers = [row for row in result.rows if row.name not in summed]
    rows += [f"integer: {row.name}  {_unequal(row.distance)}" for row in integers]
    rows += [
        f"not measured (8-bit or complex): {n}  {'the same bytes' if equal else 'other bytes'}"
        for n, equal in result.opaque.items()
    ]
    not_finite = [(r.name, r.distance.count - r.distance.compared) for r in result.rows]
    rows += [
        f"not finite: {name}  {count:,} elements, left out of the measures"
        for name, count in not_finite
        if count
    ]
    return ["", *rows] if rows else []


def _unequal(measured: Distance) -> str:
    if measured.equal == measured.count:
        return f"{measured.count:,} elements, all equal; not in the sums"
    return f"{measured.count - measured.equal:,} of {measured.count:,} elements differ; not in the sums"


def _grouped_names(label: str, names: Sequence[str]) -> list[str]:
    """One line per group of names that differ only in their numbers."""
    counts = Counter(_starred(name.split(".")) for name in names)
    examples = {_starred(name.split(".")): name for name in names}
    return [
        f"{label}: {pattern} ({count} tensors)" if count > 1 else f"{label}: {examples[pattern]}"
        for pattern, count in counts.items()
    ]
