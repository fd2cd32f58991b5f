"""Decides which tensors are mixed, copied, left out or refused, then makes one plan for each set of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.errors import UserError
from pretrain.merge.merge_plan import NATIVE_BASE_METHODS, Method, Options, Plan, Term, Treatment, letter
from pretrain.merge.planning.assemble import Blend, PlannedTensor, assemble, mismatch_error
from pretrain.merge.planning.inputs import LEFT_OUT, RECOMPUTED, OpenedInputs, open_inputs, quantised_inputs
from pretrain.merge.planning.lineage import duplicate_notes, lineage_notes
from pretrain.merge.planning.request import Request
from pretrain.merge.planning.rules import Rules
from pretrain.merge.planning.settings import settings_notes
from pretrain.merge.vocabulary.align import aligned
from pretrain.weights.dtypes import FLOATS, TensorInfo
from pretrain.weights.source import WeightSource

# Kind of problem -> advice.
ADVICE = {
    "missing": "--only limits what is mixed; --copy-rest names the model that the other tensors are copied from",
    "shape": "tensors of different shapes cannot be mixed: exclude them with --exclude and copy them with --copy-rest",
    "dtype": "--dtype sets the output dtype",
    "f8": "8-bit floats cannot be mixed: name the weights in 16 bits that they were made from",
    "rule": "correct or remove the rules",
    "differ": "--copy-rest names the model whose tensors are copied",
    "none": "--only, --exclude and the rules select the tensors to mix",
}


@dataclass(frozen=True)
class Slot:
    """A tensor of the output before its weights are known. `origin`: the source to copy it from; None: any."""

    name: str
    info: TensorInfo
    treatment: Treatment
    origin: int | None


class Planner:
    """Decides about every tensor once; then makes one plan for each set of weights.

    All plans have the same tensors at the same offsets.

    sources: the inputs, then the other models that the request names.
    named:   address or letter in the request -> index into `sources`, for base, copy_rest and copy_from.
    active:  inputs with a non-zero weight in at least one plan; data of the other inputs are never read.
    Raises one UserError that lists all mismatches: missing or extra tensors, shapes, dtypes, and tensors that are not
    mixed but differ between the inputs.
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
        self._names_of = [set(source.names()) for source in sources]
        self._problems: list[tuple[str, str]] = []  # (key of ADVICE, description)
        self._left_out: list[str] = []
        self._notes: list[str] = []
        self._slots: list[Slot] = []
        order = [rest for rest in (self.rest, self.base) if rest is not None] + list(range(self.inputs))
        every = dict.fromkeys(name for i in order for name in sources[i].names())
        for name in every:
            self._decide(name)
        self._refuse_quantised()
        self._problems += [("rule", problem) for problem in self._rules.unmatched(every)]
        if not any(slot.treatment == "mixed" for slot in self._slots) and not self._problems:
            selection = f"matches '{request.only}'" if request.only is not None else "could be mixed"
            self._problems.append(("none", f"no tensor {selection}"))
        if self._problems:
            names = " and ".join(self._name(i) for i in range(self.inputs))
            advice = dict.fromkeys(ADVICE[kind] for kind, _ in self._problems)
            raise mismatch_error(names, [problem for _, problem in self._problems], "\n".join(advice))
        self._frozen = self._shared_frozen()

    def _refuse_quantised(self) -> None:
        used = self._inputs_and_base()
        mixing = any(slot.treatment == "mixed" for slot in self._slots) or self._problems
        if mixing and (errors := quantised_inputs([self.sources[i] for i in used])):
            raise UserError("\n".join(errors))

    def _inputs_and_base(self) -> list[int]:
        return [*range(self.inputs), *([self.base] if self.base is not None else [])]

    def plan(self, weights: Sequence[float] | None = None) -> Plan:
        """The plan for `weights`, one resolved weight per input; default: those of the request."""
        weights = self.request.weights if weights is None else weights
        nonzero = [i for i in range(self.inputs) if weights[i] != 0]
        main = next(i for i in (self.rest, self.base, *nonzero, 0) if i is not None)
        linked = set() if self._frozen is None else {s.name for s in self._slots if self._is_frozen(s)}
        slots = [slot for slot in self._slots if slot.name not in linked]
        planned = [
            PlannedTensor(
                slot.name,
                self._output_info(slot),
                slot.treatment,
                self._blend(slot, weights, nonzero[0] if nonzero else 0),
            )
            for slot in slots
        ]
        return assemble(
            planned,
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
            notes=[
                *self.request.notes,
                *self._notes,
                *duplicate_notes(self.sources),
                *lineage_notes(self.sources),
                *settings_notes(self.sources[: self.inputs]),
            ],
        )

    def _blend(self, slot: Slot, weights: Sequence[float], first: int) -> Blend:
        if slot.treatment != "mixed":
            return Blend("copy", (Term(slot.origin if slot.origin is not None else first, slot.name),))
        tensor_weights = self._rules.weights(slot.name, weights)
        terms = tuple(
            Term(i, slot.name, float(tensor_weights[i]), self.request.densities[i])
            for i in range(self.inputs)
        )
        base = Term(self.base, slot.name) if self.base is not None else None
        method: Method = self.request.method  # type: ignore[assignment]
        return Blend(method, terms, base, self._options(tensor_weights))

    def _options(self, weights: Sequence[float]) -> Options:
        request, method = self.request, self.request.method
        options: dict[str, float | bool | int] = {}
        if method == "slerp":
            options["t"] = float(weights[1])
        if method in NATIVE_BASE_METHODS:
            options |= {"lambda": request.scale, "normalize": request.normalize}
        if method.startswith("dare"):
            options |= {"rescale": request.rescale, "seed": request.seed}
        return tuple(sorted(options.items()))

    def _output_info(self, slot: Slot) -> TensorInfo:
        return (self.dtype or slot.info[0], slot.info[1]) if slot.treatment == "mixed" else slot.info

    def _decide(self, name: str) -> None:
        rule = self._rules.first_match(name)
        if rule is not None and rule.copy_from is not None:
            self._copy(name, rule.copy_from)
            return
        holders = [i for i in range(self.inputs) if name in self._names_of[i]]
        if not self._rules.mixes(name):
            outside = self._rules.not_matched_by_only(name)
            treatment: Treatment = "rest" if outside else "excluded"
            reason = "does not match --only" if outside else "is excluded"
            self._unmixed(name, holders, treatment, reason)
        elif len(holders) < self.inputs or (self.base is not None and name not in self._names_of[self.base]):
            if self.rest is not None:
                self._from_rest(name, "rest")
            elif RECOMPUTED.search(name):
                self._left_out.append(name)
                self._notes.append(f"{name}: {LEFT_OUT}")
            else:
                self._missing(name)
        elif all(name in source.frozen for source in self.sources[: self.inputs]):
            self._unmixed(name, holders, "frozen", "is frozen")
        else:
            self._mix(name)

    def _copy(self, name: str, model: str) -> None:
        origin = self._named[model]
        if name in self._names_of[origin]:
            self._slots.append(Slot(name, self.sources[origin].info(name), "rule", origin))
        else:
            problem = f"{name}: a rule copies it from {self._name(origin)}, which does not have it"
            self._problems.append(("rule", problem))

    def _unmixed(self, name: str, holders: Sequence[int], treatment: Treatment, reason: str) -> None:
        if self.rest is not None:
            self._from_rest(name, treatment)
        else:
            self._same_everywhere(name, holders, treatment, reason)

    def _mix(self, name: str) -> None:
        used = self._inputs_and_base()
        infos = [self.sources[i].info(name) for i in used]
        if len({shape for _, shape in infos}) > 1:
            shapes = ", ".join(f"{list(s)} in {self._name(i)}" for i, (_, s) in zip(used, infos, strict=True))
            self._problems.append(("shape", f"{name}: shape {shapes}"))
            return
        dtypes = [dtype for dtype, _ in infos]
        floats = all(dtype in FLOATS for dtype in dtypes)
        if len(set(dtypes)) > 1 and not (floats and self.dtype):
            listed = ", ".join(f"{d} in {self._name(i)}" for i, d in zip(used, dtypes, strict=True))
            self._problems.append(("dtype" if floats else "shape", f"{name}: dtype {listed}"))
        elif floats:
            self._slots.append(Slot(name, infos[0], "mixed", None))
        elif any(dtype.startswith("F8") for dtype in dtypes):
            self._problems.append(("f8", f"{name}: dtype {dtypes[0]} cannot be mixed"))
        else:
            if any(dtype.startswith("C") for dtype in dtypes):
                self._notes.append(f"{name}: {dtypes[0]}, complex numbers are copied, not mixed")
            if self.rest is not None:
                self._from_rest(name, "integer")
            else:
                self._slots.append(Slot(name, infos[0], "integer", None))

    def _from_rest(self, name: str, treatment: Treatment) -> None:
        assert self.rest is not None
        if name in self._names_of[self.rest]:
            self._slots.append(Slot(name, self.sources[self.rest].info(name), treatment, self.rest))
        else:
            self._left_out.append(name)

    def _same_everywhere(self, name: str, holders: Sequence[int], treatment: Treatment, reason: str) -> None:
        if len(holders) < self.inputs:
            self._missing(name)
            return
        first = self._active[0]
        for other in self._active[1:]:
            if not self.sources[first].equal(name, self.sources[other]):
                differs = f"{name}: {reason}, but differs between {self._name(first)} and {self._name(other)}"
                self._problems.append(("differ", differs))
                return
        self._slots.append(Slot(name, self.sources[first].info(name), treatment, first))

    def _missing(self, name: str) -> None:
        used = self._inputs_and_base()
        holders = [i for i in used if name in self._names_of[i]]
        absent = [i for i in used if i not in holders]
        where = ", ".join(self._name(i) for i in absent)
        tie = next((self.sources[i].tied[name] for i in absent if name in self.sources[i].tied), None)
        note = f" (tied to {tie} there)" if tie else ""
        problem = f"{name}: only in {self._name(holders[0])}, missing in {where}{note}"
        self._problems.append(("missing", problem))

    def _is_frozen(self, slot: Slot) -> bool:
        return slot.origin is not None and slot.name in self.sources[slot.origin].frozen

    def _shared_frozen(self) -> Path | None:
        """A frozen.safetensors whose tensors are all in the output, so that it can be shared instead of rewritten."""
        origins = {slot.origin for slot in self._slots if self._is_frozen(slot)}
        if len(origins) != 1:
            return None
        source = self.sources[origins.pop() or 0]
        taken = {slot.name for slot in self._slots if self._is_frozen(slot)}
        return source.frozen_file if taken == source.frozen else None

    def _name(self, index: int) -> str:
        return f"{'base' if index == self.base else letter(index)} ({self.sources[index].address})"


def open_request(request: Request, run_dir: Path | None = None) -> OpenedInputs:
    """Open all models that a request names, and align their vocabularies by its rule.

    Raises UserError if it mixes embeddings of different vocabularies without a rule.
    """
    copied = [rule.copy_from for rule in request.rules]
    others = [request.base, request.copy_rest, *copied]
    main = request.copy_rest or request.base
    opened = open_inputs(request.inputs, others, run_dir, request.key, main)
    mixes = Rules(request).mixes
    return replace(opened, sources=aligned(opened.sources, request.vocabulary, mixes))


def prepare(
    request: Request, weights: Sequence[Sequence[float]] | None = None, run_dir: Path | None = None
) -> tuple[list[Plan], OpenedInputs]:
    """One plan per row of resolved weights (default: the request's); all have the same tensors at the same offsets."""
    rows = [request.weights] if weights is None else weights
    opened = open_request(request, run_dir)
    active = [i for i in range(opened.inputs) if any(row[i] != 0 for row in rows)]
    planner = Planner(opened.sources, request, opened.named, active)
    return [planner.plan(row) for row in rows], opened
