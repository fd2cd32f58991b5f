"""What becomes of one tensor of a mergekit file: its parameters resolved, and the blend that they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_pipeline.errors import UserError
from pretrain.merge.merge_plan import Method, Term, letter
from pretrain.merge.mergekit.parameters import parameter
from pretrain.merge.mergekit.yaml_file import BASED, SPANNED, Input, MergekitFile, Slice
from pretrain.merge.planning.assemble import Blend, PlannedTensor
from pretrain.merge.planning.request import normalized
from pretrain.merge.vocabulary.align import is_vocabulary
from pretrain.weights.dtypes import FLOATS, TensorInfo
from pretrain.weights.source import WeightSource, same_tensor

WIDTH = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the output: its names in the inputs of a slice, and where it stands in that slice."""

    name: str
    part: Slice
    names: tuple[str, ...]  # one for each input of the slice
    at: float


class TensorResolver:
    """Resolves tensor by tensor and collects what does not fit."""

    def __init__(
        self, file: MergekitFile, sources: Sequence[WeightSource], index: dict[str, int], seed: int
    ) -> None:
        self._problems: list[str] = []
        self._unset: dict[str, list[str]] = {}  # what is wrong with parameters -> tensors
        self._file, self._sources, self._index, self._seed = file, sources, index, seed
        self._held = [set(source.names()) for source in sources]

    @property
    def problems(self) -> list[str]:
        """What does not fit, tensor by tensor; a parameter that is wrong for many of them once."""
        return self._problems + [f"{_several(names)}: {why}" for why, names in self._unset.items()]

    def decide(self, want: OutputTensor) -> PlannedTensor | None:
        """The tensor, or None and a problem."""
        inputs = [
            (one, Term(self._index[one.model], name))
            for one, name in zip(want.part.inputs, want.names, strict=True)
        ]
        absent = [term for _, term in inputs if term.name not in self._held[term.source]]
        if absent:
            where = ", ".join(f"{letter(t.source)} ({self._sources[t.source].address})" for t in absent)
            tie = self._sources[absent[0].source].tied.get(absent[0].name)
            note = f" (tied to {tie} there)" if tie else ""
            self._problems.append(f"{want.name}: {absent[0].name} is missing in {where}{note}")
            return None
        infos = [self._sources[term.source].info(term.name) for _, term in inputs]
        if len({shape for _, shape in infos}) > 1:
            shapes = ", ".join(str(list(shape)) for _, shape in infos)
            rows = self._file.tokens is None and is_vocabulary(want.name)
            advice = "; tokenizer_source: base (or union) gives all the same rows" if rows else ""
            self._problems.append(f"{want.name}: shapes {shapes}{advice}")
            return None
        if not all(dtype in FLOATS for dtype, _ in infos):
            return self._same(want, [term for _, term in inputs], infos)
        try:
            blend = self._blend(want, inputs)
        except UserError as error:
            self._unset.setdefault(str(error), []).append(want.name)
            return None
        dtype = self._file.dtype or _promoted([dtype for dtype, _ in infos])
        kept = self._file.method == "passthrough" and blend.terms[0].weight == 1
        return PlannedTensor(want.name, (dtype, infos[0][1]), "layer" if kept else "mixed", blend)

    def _same(self, want: OutputTensor, terms: list[Term], infos: list[TensorInfo]) -> PlannedTensor | None:
        """What is no float is copied, and must be the same in every input."""
        if self._file.method != "passthrough" and any(dtype.startswith("F8") for dtype, _ in infos):
            advice = "8-bit floats cannot be mixed; bring them back to 16 bits first"
            self._problems.append(f"{want.name}: dtype {infos[0][0]}: {advice}")
            return None
        first = self._sources[terms[0].source]
        for term in terms[1:]:
            if not same_tensor(first, terms[0].name, self._sources[term.source], term.name):
                self._problems.append(f"{want.name}: {infos[0][0]}, and not the same in every input")
                return None
        return PlannedTensor(want.name, infos[0], "integer", Blend("copy", (terms[0],)))

    def _blend(self, want: OutputTensor, inputs: list[tuple[Input, Term]]) -> Blend:
        method = self._file.method
        base = next((term for one, term in inputs if one.model == want.part.base), None)
        if method == "passthrough":
            scale = self._own("scale", want, *inputs[0], None)
            return Blend("linear", (replace(inputs[0][1], weight=1.0 if scale is None else scale),))
        if method == "slerp":
            assert base is not None
            t = self._shared("t", want, None)
            if t is None:
                raise UserError("parameter t is missing")
            other = next(term for one, term in inputs if one.model != want.part.base)
            pair = (replace(base, weight=1.0 - t), replace(other, weight=t))
            return Blend("slerp", pair, options=(("t", t),))
        if method == "linear":
            weights = [self._weight(want, one, term) for one, term in inputs]
            if self._shared("normalize", want, 1.0):
                weights = list(normalized(weights))
            return Blend(
                "linear", tuple(replace(t, weight=w) for (_, t), w in zip(inputs, weights, strict=True))
            )
        if method in (*SPANNED, "sce"):
            return self._spanned(want, inputs, base)
        return self._differences(want, inputs, base)

    def _spanned(self, want: OutputTensor, inputs: list[tuple[Input, Term]], base: Term | None) -> Blend:
        """Methods that weigh the models themselves."""
        method: Method = self._file.method  # type: ignore[assignment]
        if method == "karcher":
            steps, tol = self._shared("max_iter", want, 10), self._shared("tol", want, 1e-5)
            return Blend(
                method,
                tuple(t for _, t in inputs),
                options=(("max_iter", int(steps or 0)), ("tol", tol or 0.0)),
            )
        others = [(one, term) for one, term in inputs if term is not base]
        if method == "sce":
            share = self._shared("select_topk", want, 1.0)
            return Blend(method, tuple(term for _, term in others), base, (("select_topk", share or 0.0),))
        if method == "model_stock":
            self._refuse("filter_wise", want, False)
            return Blend(method, tuple(term for _, term in others), base)
        weights = [self._weight(want, one, term) for one, term in others]
        if method == "nuslerp":
            self._refuse("nuslerp_flatten", want, True)
            t = 0.5 if abs(sum(weights)) < 1e-6 else weights[1] / sum(weights)
            weights, options = [1.0 - t, t], [("t", t)]
        else:
            if len(weights) == 1:  # mergekit takes that model as it is
                weights = [1.0]
            elif self._shared("normalize_weights", want, 1.0):
                weights = list(normalized(weights))
            options = [("eps", self._shared("eps", want, 1e-8) or 0.0)]
        terms = (replace(term, weight=weight) for (_, term), weight in zip(others, weights, strict=True))
        return Blend(method, tuple(terms), base, tuple(options))

    def _refuse(self, key: str, want: OutputTensor, default: bool) -> None:
        """A switch that is only supported as mergekit has it by default."""
        if bool(self._shared(key, want, float(default))) is not default:
            raise UserError(
                f"{key}: {str(not default).lower()} (row by row) is not supported; leave {key} out"
            )

    def _differences(self, want: OutputTensor, inputs: list[tuple[Input, Term]], base: Term | None) -> Blend:
        assert base is not None
        method = self._file.method
        assert method in BASED
        normalize = bool(self._shared("normalize", want, float(method == "ties")))
        sparse, dare = method != "task_arithmetic", method.startswith("dare")
        rescale = bool(self._shared("rescale", want, float(dare)))
        options: dict[str, Any] = {"lambda": self._shared("lambda", want, 1.0), "normalize": normalize}
        if dare or (rescale and sparse):
            options["rescale"] = "l1" if rescale else False
        if dare:
            options["seed"] = self._seed
        gammas: set[float] = set()
        terms = []
        for one, term in inputs:
            if term is base:
                continue
            if method.startswith("breadcrumbs"):
                gammas.add(self._own("gamma", want, one, term, 0.01) or 0.0)
            density = self._own("density", want, one, term, 1.0) if sparse else 1.0
            assert density is not None
            weight = self._weight(want, one, term)
            if density <= 0:
                if method in ("dare_linear", "breadcrumbs") and normalize and weight:
                    raise UserError("density 0 of a weighted model cannot be normalized; give weight 0")
                continue
            terms.append(replace(term, weight=weight, density=min(density, 1.0)))
        if len(gammas) > 1:
            raise UserError(
                f"gamma differs between models ({', '.join(f'{g:g}' for g in sorted(gammas))}): give one"
            )
        options |= dict.fromkeys(("gamma",) if gammas else (), max(gammas, default=0.0))
        return Blend(method, tuple(terms), base, tuple(options.items()))  # type: ignore[arg-type]

    def _weight(self, want: OutputTensor, one: Input, term: Term) -> float:
        found = self._own("weight", want, one, term, None)
        if found is None:
            raise UserError(f"parameter weight is missing for {one.model}")
        return found

    def _own(
        self, key: str, want: OutputTensor, one: Input, term: Term, default: float | None
    ) -> float | None:
        """A parameter of one input: filters see the tensor's name in that input."""
        found = parameter(self._file, want.part, one, key, term.name, want.at)
        return default if found is None else float(found)

    def _shared(self, key: str, want: OutputTensor, default: float | None) -> float | None:
        """A parameter of the whole tensor: filters see its name in the output."""
        found = parameter(self._file, want.part, None, key, want.name, want.at)
        return default if found is None else float(found)


def _several(names: Sequence[str]) -> str:
    more = len(names) - 1
    return names[0] + (f" and {more} more tensor{'s' if more > 1 else ''}" if more else "")


def _promoted(dtypes: Sequence[str]) -> str:
    """The dtype that holds all of them."""
    widest = max(dtypes, key=lambda dtype: WIDTH[dtype])
    return "F32" if WIDTH[widest] == 2 and len(set(dtypes)) > 1 else widest
