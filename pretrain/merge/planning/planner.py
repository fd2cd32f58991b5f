"""Decides for a set of inputs what is mixed, copied, left out or refused; then plans any weights of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.errors import UserError
from pretrain.merge.merge_plan import BASED, Method, Options, Plan, Term, Why, letter
from pretrain.merge.planning.assemble import Blend, PlannedTensor, assemble, refusal
from pretrain.merge.planning.inputs import OpenedInputs, open_inputs, quantised_inputs
from pretrain.merge.planning.lineage import duplicate_notes, lineage_notes
from pretrain.merge.planning.request import Request
from pretrain.merge.planning.rules import Rules
from pretrain.merge.vocabulary.align import aligned
from pretrain.weights.dtypes import FLOATS, TensorInfo
from pretrain.weights.source import WeightSource

ADVICE = {
    "missing": "--only narrows what is mixed, --copy-rest says from whom the rest is taken",
    "shape": "tensors of other shapes cannot be mixed: --exclude leaves them out, --copy-rest says from whom they are",
    "dtype": "--dtype says which type is written",
    "f8": "8-bit floats cannot be mixed: bring them back to 16 bits, or leave them out with --exclude and --copy-rest",
    "rule": "mend the rules, or leave them out",
    "differ": "--copy-rest says whose tensors are taken",
    "none": "--only, --exclude and the rules say what is mixed",
}
"""what to do, by what is wrong"""


@dataclass(frozen=True)
class Slot:
    """A tensor of the output before its weights are known; `origin`: the one source it is copied from."""

    name: str
    info: TensorInfo
    why: Why
    origin: int | None


class Planner:
    """Decides once what becomes of every tensor; then plans any weights, all with the same tensors in the same places.

    sources: the inputs, after them whatever else the request names.
    named:   address or letter, as the request writes it -> index into `sources`, for base, copy_rest, copy_from.
    active:  inputs whose weight is not zero in at least one plan; the others' data are never read.
    Raises one UserError with every mismatch: missing, extra, shape, dtype, unequal tensors nobody was named for.
    """

    def __init__(
        self,
        sources: Sequence[WeightSource],
        request: Request,
        named: dict[str, int],
        active: Sequence[int] | None = None,
    ) -> None:
        self.sources, self.request, self.inputs = sources, request, len(request.inputs)
        self.dtype, self._named = request.dtype, named
        self.rest = named[request.copy_rest] if request.copy_rest is not None else None
        self.base = named[request.base] if request.base is not None else None
        self._active = list(active) if active else list(range(self.inputs))
        self._rules = Rules(request)
        self._held = [set(source.names()) for source in sources]
        self._problems: list[tuple[str, str]] = []  # what is wrong (a key of ADVICE), in words
        self._left_out: list[str] = []
        self._slots: list[Slot] = []
        order = [rest for rest in (self.rest, self.base) if rest is not None] + list(range(self.inputs))
        every = dict.fromkeys(name for i in order for name in sources[i].names())
        for name in every:
            self._decide(name)
        self._refuse_quantised()
        self._problems += [("rule", problem) for problem in self._rules.unmatched(every)]
        if not any(slot.why == "mixed" for slot in self._slots) and not self._problems:
            found = f"matches '{request.only}'" if request.only is not None else "could be mixed"
            self._problems.append(("none", f"no tensor {found}"))
        if self._problems:
            names = " and ".join(self._name(i) for i in range(self.inputs))
            advice = dict.fromkeys(ADVICE[kind] for kind, _ in self._problems)
            raise refusal(names, [problem for _, problem in self._problems], "\n".join(advice))
        self._frozen = self._shared_frozen()

    def _refuse_quantised(self) -> None:
        taking = [*range(self.inputs), *([self.base] if self.base is not None else [])]
        mixing = any(slot.why == "mixed" for slot in self._slots) or self._problems
        if mixing and (found := quantised_inputs([self.sources[i] for i in taking])):
            raise UserError("\n".join(found))

    def plan(self, weights: Sequence[float] | None = None) -> Plan:
        """`weights`: one resolved weight for each input; default: the request's."""
        weights = self.request.weights if weights is None else weights
        nonzero = [i for i in range(self.inputs) if weights[i] != 0]
        main = next(i for i in (self.rest, self.base, *nonzero, 0) if i is not None)
        linked = set() if self._frozen is None else {s.name for s in self._slots if self._is_frozen(s)}
        slots = [slot for slot in self._slots if slot.name not in linked]
        decided = [
            PlannedTensor(
                slot.name,
                self._stored(slot),
                slot.why,
                self._blend(slot, weights, nonzero[0] if nonzero else 0),
            )
            for slot in slots
        ]
        return assemble(
            decided,
            self.sources,
            main,
            self.request.max_shard_size,
            inputs=self.inputs,
            method=self.request.method,
            weights=weights,
            request=replace(self.request, weights=tuple(weights)).to_dict(),
            dtype=self.dtype,
            frozen=self._frozen,
            left_out=self._left_out,
            notes=[*self.request.notes, *duplicate_notes(self.sources), *lineage_notes(self.sources)],
        )

    def _blend(self, slot: Slot, weights: Sequence[float], first: int) -> Blend:
        if slot.why != "mixed":
            return Blend("copy", (Term(slot.origin if slot.origin is not None else first, slot.name),))
        own = self._rules.weights(slot.name, weights)
        terms = tuple(
            Term(i, slot.name, float(own[i]), self.request.densities[i]) for i in range(self.inputs)
        )
        base = Term(self.base, slot.name) if self.base is not None else None
        method: Method = self.request.method  # type: ignore[assignment]
        return Blend(method, terms, base, self._options(own))

    def _options(self, weights: Sequence[float]) -> Options:
        asked, method = self.request, self.request.method
        options: dict[str, float | bool | int] = {}
        if method == "slerp":
            options["t"] = float(weights[1])
        if method in BASED:
            options |= {"lambda": asked.scale, "normalize": asked.normalize}
        if method.startswith("dare"):
            options |= {"rescale": asked.rescale, "seed": asked.seed}
        return tuple(sorted(options.items()))

    def _stored(self, slot: Slot) -> TensorInfo:
        return (self.dtype or slot.info[0], slot.info[1]) if slot.why == "mixed" else slot.info

    def _decide(self, name: str) -> None:
        rule = self._rules.first_match(name)
        if rule is not None and rule.copy_from is not None:
            self._copy(name, rule.copy_from)
            return
        holders = [i for i in range(self.inputs) if name in self._held[i]]
        if not self._rules.mixes(name):
            outside = self._rules.outside_only(name)
            why: Why = "rest" if outside else "excluded"
            self._unmixed(name, holders, why, "outside only" if outside else "excluded")
        elif len(holders) < self.inputs or (self.base is not None and name not in self._held[self.base]):
            if self.rest is not None:
                self._from_rest(name, "rest")
            else:
                self._missing(name)
        elif all(name in source.frozen for source in self.sources[: self.inputs]):
            self._unmixed(name, holders, "frozen", "frozen")
        else:
            self._mix(name)

    def _copy(self, name: str, wanted: str) -> None:
        origin = self._named[wanted]
        if name in self._held[origin]:
            self._slots.append(Slot(name, self.sources[origin].info(name), "rule", origin))
        else:
            problem = f"{name}: a rule copies it from {self._name(origin)}, which has none"
            self._problems.append(("rule", problem))

    def _unmixed(self, name: str, holders: Sequence[int], why: Why, what: str) -> None:
        if self.rest is not None:
            self._from_rest(name, why)
        else:
            self._same_everywhere(name, holders, why, what)

    def _mix(self, name: str) -> None:
        taking = [*range(self.inputs), *([self.base] if self.base is not None else [])]
        infos = [self.sources[i].info(name) for i in taking]
        if len({shape for _, shape in infos}) > 1:
            shapes = ", ".join(
                f"{list(s)} in {self._name(i)}" for i, (_, s) in zip(taking, infos, strict=True)
            )
            self._problems.append(("shape", f"{name}: shape {shapes}"))
            return
        dtypes = [dtype for dtype, _ in infos]
        floats = all(dtype in FLOATS for dtype in dtypes)
        if len(set(dtypes)) > 1 and not (floats and self.dtype):
            listed = ", ".join(f"{d} in {self._name(i)}" for i, d in zip(taking, dtypes, strict=True))
            self._problems.append(("dtype" if floats else "shape", f"{name}: dtype {listed}"))
        elif floats:
            self._slots.append(Slot(name, infos[0], "mixed", None))
        elif any(dtype.startswith("F8") for dtype in dtypes):
            self._problems.append(("f8", f"{name}: dtype {dtypes[0]} cannot be mixed"))
        elif self.rest is not None:
            self._from_rest(name, "integer")
        else:
            self._slots.append(Slot(name, infos[0], "integer", None))

    def _from_rest(self, name: str, why: Why) -> None:
        assert self.rest is not None
        if name in self._held[self.rest]:
            self._slots.append(Slot(name, self.sources[self.rest].info(name), why, self.rest))
        else:
            self._left_out.append(name)

    def _same_everywhere(self, name: str, holders: Sequence[int], why: Why, what: str) -> None:
        if len(holders) < self.inputs:
            self._missing(name)
            return
        first = self._active[0]
        for other in self._active[1:]:
            if not self.sources[first].equal(name, self.sources[other]):
                differs = f"{name}: {what}, and differs between {self._name(first)} and {self._name(other)}"
                self._problems.append(("differ", differs))
                return
        self._slots.append(Slot(name, self.sources[first].info(name), why, first))

    def _missing(self, name: str) -> None:
        taking = [*range(self.inputs), *([self.base] if self.base is not None else [])]
        holders = [i for i in taking if name in self._held[i]]
        absent = [i for i in taking if i not in holders]
        where = ", ".join(self._name(i) for i in absent)
        tie = next((self.sources[i].tied[name] for i in absent if name in self.sources[i].tied), None)
        note = f" (there it is tied to {tie})" if tie else ""
        problem = f"{name}: only in {self._name(holders[0])}, missing in {where}{note}"
        self._problems.append(("missing", problem))

    def _is_frozen(self, slot: Slot) -> bool:
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
        return f"{'base' if index == self.base else letter(index)} ({self.sources[index].address})"


def open_request(request: Request, run_dir: Path | None = None) -> OpenedInputs:
    """Open everything that a request names, vocabularies brought together as it asks.

    Raises UserError where embeddings of different vocabularies would be mixed and it does not say how.
    """
    copied = [rule.copy_from for rule in request.rules]
    opened = open_inputs(request.inputs, [request.base, request.copy_rest, *copied], run_dir)
    mixes = Rules(request).mixes
    return replace(opened, sources=aligned(opened.sources, request.vocabulary, mixes))


def prepare(
    request: Request, weights: Sequence[Sequence[float]] | None = None, run_dir: Path | None = None
) -> tuple[list[Plan], OpenedInputs]:
    """One plan a row of resolved weights (default: the request's own), all with the same tensors in the same places."""
    rows = [request.weights] if weights is None else weights
    opened = open_request(request, run_dir)
    active = [i for i in range(opened.inputs) if any(row[i] != 0 for row in rows)]
    planner = Planner(opened.sources, request, opened.named, active)
    return [planner.plan(row) for row in rows], opened
