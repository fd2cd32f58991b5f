"""Resolves one output tensor of a mergekit file: its parameters, and the `Blend` that they define."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_pipeline.errors import UserError
from pretrain.merge.merge_plan import Method, Term, letter
from pretrain.merge.mergekit.parameters import parameter
from pretrain.merge.mergekit.yaml_file import (
    GEOMETRIC_METHODS,
    MERGEKIT_BASE_METHODS,
    Input,
    MergekitFile,
    Slice,
)
from pretrain.merge.planning.assemble import Blend, PlannedTensor
from pretrain.merge.planning.inputs import LEFT_OUT, RECOMPUTED
from pretrain.merge.planning.request import normalized
from pretrain.merge.vocabulary.align import is_vocabulary
from pretrain.weights.dtypes import FLOATS, TensorInfo
from pretrain.weights.source import WeightSource, same_tensor

WIDTH = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the output: its slice, and its names in the inputs of that slice."""

    name: str
    part: Slice
    names: tuple[str, ...]  # one per input of the slice
    at: float  # position of its layer in the slice, from 0 to 1


class TensorResolver:
    """Resolves tensors one by one and collects the mismatches in `problems`."""

    def __init__(
        self, file: MergekitFile, sources: Sequence[WeightSource], index: dict[str, int], seed: int
    ) -> None:
        self._problems: list[str] = []
        self.notes: list[str] = []
        self._wrong_parameters: dict[str, list[str]] = {}  # error -> tensors
        self._file, self._sources, self._index, self._seed = file, sources, index, seed
        self._names_by_source = [set(source.names()) for source in sources]

    @property
    def problems(self) -> list[str]:
        """All mismatches; the same wrong parameter of many tensors is listed once."""
        return self._problems + [
            f"{_name_and_count(names)}: {why}" for why, names in self._wrong_parameters.items()
        ]

    def resolve(self, tensor: OutputTensor) -> PlannedTensor | None:
        """The planned tensor; None if it has a mismatch, which is added to `problems`."""
        inputs = [
            (model_input, Term(self._index[model_input.model], name))
            for model_input, name in zip(tensor.part.inputs, tensor.names, strict=True)
        ]
        absent = [term for _, term in inputs if term.name not in self._names_by_source[term.source]]
        if absent and RECOMPUTED.search(tensor.name):
            self.notes.append(f"{tensor.name}: {LEFT_OUT}")
            return None
        if absent:
            where = ", ".join(f"{letter(t.source)} ({self._sources[t.source].address})" for t in absent)
            tie = self._sources[absent[0].source].tied.get(absent[0].name)
            note = f" (tied to {tie} there)" if tie else ""
            self._problems.append(f"{tensor.name}: {absent[0].name} is missing in {where}{note}")
            return None
        infos = [self._sources[term.source].info(term.name) for _, term in inputs]
        if len({shape for _, shape in infos}) > 1:
            shapes = ", ".join(str(list(shape)) for _, shape in infos)
            rows = self._file.tokens is None and is_vocabulary(tensor.name)
            advice = (
                "; set tokenizer_source: base (or union) to give all inputs the same rows" if rows else ""
            )
            self._problems.append(f"{tensor.name}: shapes {shapes}{advice}")
            return None
        if not all(dtype in FLOATS for dtype, _ in infos):
            return self._copy_if_equal(tensor, [term for _, term in inputs], infos)
        try:
            blend = self._blend(tensor, inputs)
        except UserError as error:
            self._wrong_parameters.setdefault(str(error), []).append(tensor.name)
            return None
        dtype = self._file.dtype or _promoted([dtype for dtype, _ in infos])
        kept = self._file.method == "passthrough" and blend.terms[0].weight == 1
        return PlannedTensor(tensor.name, (dtype, infos[0][1]), "layer" if kept else "mixed", blend)

    def _copy_if_equal(
        self, tensor: OutputTensor, terms: list[Term], infos: list[TensorInfo]
    ) -> PlannedTensor | None:
        """Copy a tensor that is not floating point; it must be equal in every input."""
        if self._file.method != "passthrough" and any(dtype.startswith("F8") for dtype, _ in infos):
            advice = "8-bit floats cannot be mixed; name the weights in 16 bits that they were made from"
            self._problems.append(f"{tensor.name}: dtype {infos[0][0]}: {advice}")
            return None
        if infos[0][0].startswith("C"):
            self.notes.append(f"{tensor.name}: {infos[0][0]}, complex numbers are copied, not mixed")
        first = self._sources[terms[0].source]
        for term in terms[1:]:
            if not same_tensor(first, terms[0].name, self._sources[term.source], term.name):
                self._problems.append(f"{tensor.name}: {infos[0][0]}, and differs between the inputs")
                return None
        return PlannedTensor(tensor.name, infos[0], "integer", Blend("copy", (terms[0],)))

    def _blend(self, tensor: OutputTensor, inputs: list[tuple[Input, Term]]) -> Blend:
        method = self._file.method
        base = next((term for model_input, term in inputs if model_input.model == tensor.part.base), None)
        if method == "passthrough":
            scale = self._own("scale", tensor, *inputs[0], None)
            return Blend("linear", (replace(inputs[0][1], weight=1.0 if scale is None else scale),))
        if method == "slerp":
            assert base is not None
            t = self._shared("t", tensor, None)
            if t is None:
                raise UserError("parameter t is missing")
            other = next(term for model_input, term in inputs if model_input.model != tensor.part.base)
            pair = (replace(base, weight=1.0 - t), replace(other, weight=t))
            return Blend("slerp", pair, options=(("t", t),))
        if method == "linear":
            weights = [self._weight(tensor, model_input, term) for model_input, term in inputs]
            if self._shared("normalize", tensor, 1.0):
                weights = list(normalized(weights))
            return Blend(
                "linear", tuple(replace(t, weight=w) for (_, t), w in zip(inputs, weights, strict=True))
            )
        if method in (*GEOMETRIC_METHODS, "sce"):
            return self._geometric_or_sce(tensor, inputs, base)
        return self._base_plus_differences(tensor, inputs, base)

    def _geometric_or_sce(
        self, tensor: OutputTensor, inputs: list[tuple[Input, Term]], base: Term | None
    ) -> Blend:
        """Methods that combine models by norms and angles, and SCE."""
        method: Method = self._file.method  # type: ignore[assignment]
        if method == "karcher":
            steps, tol = self._shared("max_iter", tensor, 10), self._shared("tol", tensor, 1e-5)
            return Blend(
                method,
                tuple(t for _, t in inputs),
                options=(("max_iter", int(steps or 0)), ("tol", tol or 0.0)),
            )
        others = [(model_input, term) for model_input, term in inputs if term is not base]
        if method == "sce":
            share = self._shared("select_topk", tensor, 1.0)
            return Blend(method, tuple(term for _, term in others), base, (("select_topk", share or 0.0),))
        if method == "model_stock":
            self._refuse("filter_wise", tensor, False)
            return Blend(method, tuple(term for _, term in others), base)
        weights = [self._weight(tensor, model_input, term) for model_input, term in others]
        if method == "nuslerp":
            self._refuse("nuslerp_flatten", tensor, True)
            t = 0.5 if abs(sum(weights)) < 1e-6 else weights[1] / sum(weights)
            weights, options = [1.0 - t, t], [("t", t)]
        else:
            if len(weights) == 1:  # mergekit copies a single model
                weights = [1.0]
            elif self._shared("normalize_weights", tensor, 1.0):
                weights = list(normalized(weights))
            options = [("eps", self._shared("eps", tensor, 1e-8) or 0.0)]
        terms = (replace(term, weight=weight) for (_, term), weight in zip(others, weights, strict=True))
        return Blend(method, tuple(terms), base, tuple(options))

    def _refuse(self, key: str, tensor: OutputTensor, default: bool) -> None:
        """Raises UserError if a switch differs from mergekit's default, the only supported value."""
        if bool(self._shared(key, tensor, float(default))) is not default:
            raise UserError(
                f"{key}: {str(not default).lower()} (row by row) is not supported; leave {key} out"
            )

    def _base_plus_differences(
        self, tensor: OutputTensor, inputs: list[tuple[Input, Term]], base: Term | None
    ) -> Blend:
        assert base is not None
        method = self._file.method
        assert method in MERGEKIT_BASE_METHODS
        normalize = bool(self._shared("normalize", tensor, float(method == "ties")))
        sparse, dare = method != "task_arithmetic", method.startswith("dare")
        rescale = bool(self._shared("rescale", tensor, float(dare)))
        options: dict[str, Any] = {"lambda": self._shared("lambda", tensor, 1.0), "normalize": normalize}
        if dare or (rescale and sparse):
            options["rescale"] = "l1" if rescale else False
        if dare:
            options["seed"] = self._seed
        gammas: set[float] = set()
        terms = []
        for model_input, term in inputs:
            if term is base:
                continue
            if method.startswith("breadcrumbs"):
                gammas.add(self._own("gamma", tensor, model_input, term, 0.01) or 0.0)
            density = self._own("density", tensor, model_input, term, 1.0) if sparse else 1.0
            assert density is not None
            weight = self._weight(tensor, model_input, term)
            if density <= 0:
                if method in ("dare_linear", "breadcrumbs") and normalize and weight:
                    raise UserError(
                        "density 0 of a model with a weight cannot be normalized; set its weight to 0"
                    )
                continue
            terms.append(replace(term, weight=weight, density=min(density, 1.0)))
        if len(gammas) > 1:
            raise UserError(
                f"gamma differs between models ({', '.join(f'{g:g}' for g in sorted(gammas))}); give one value"
            )
        options |= dict.fromkeys(("gamma",) if gammas else (), max(gammas, default=0.0))
        return Blend(method, tuple(terms), base, tuple(options.items()))  # type: ignore[arg-type]

    def _weight(self, tensor: OutputTensor, model_input: Input, term: Term) -> float:
        found = self._own("weight", tensor, model_input, term, None)
        if found is None:
            raise UserError(f"parameter weight is missing for {model_input.model}")
        return found

    def _own(
        self, key: str, tensor: OutputTensor, model_input: Input, term: Term, default: float | None
    ) -> float | None:
        """A parameter of one input: filters match the tensor's name in that input."""
        found = parameter(self._file, tensor.part, model_input, key, term.name, tensor.at)
        return default if found is None else float(found)

    def _shared(self, key: str, tensor: OutputTensor, default: float | None) -> float | None:
        """A parameter of the whole tensor: filters match its name in the output."""
        found = parameter(self._file, tensor.part, None, key, tensor.name, tensor.at)
        return default if found is None else float(found)


def _name_and_count(names: Sequence[str]) -> str:
    more = len(names) - 1
    return names[0] + (f" and {more} more tensor{'s' if more > 1 else ''}" if more else "")


def _promoted(dtypes: Sequence[str]) -> str:
    """The narrowest dtype that holds all of them exactly."""
    widest = max(dtypes, key=lambda dtype: WIDTH[dtype])
    return "F32" if WIDTH[widest] == 2 and len(set(dtypes)) > 1 else widest
