"""From mergekit's YAML and the models it names to a plan: layers renumbered, parameters resolved for every tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from pretrain.merge.assemble import Decided, assemble, refusal
from pretrain.merge.lineage import lineage_notes
from pretrain.merge.mergekit_parameters import parameter
from pretrain.merge.mergekit_template import template_text, with_template
from pretrain.merge.mergekit_vocabulary import same_tokens
from pretrain.merge.mergekit_yaml import BASED, SPANNED, Input, MergekitFile, Slice
from pretrain.merge.methods import FLOATS
from pretrain.merge.model_config import with_layers
from pretrain.merge.plan import Method, Plan, Term, letter
from pretrain.merge.prepare import Opened
from pretrain.merge.quantised import quantised_inputs
from pretrain.merge.resolve import Blend
from pretrain.merge.rules import split_layer
from pretrain.merge.safetensors_io import Info
from pretrain.merge.shares import normalized
from pretrain.merge.sources import WeightSource, open_weights
from pretrain.merge.vocabulary import aligned

FIRST = ("embed", "wte", "wpe")
"""parts of the names of tensors that stand before the layers; the others outside layers stand after them"""
WIDTH = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}


@dataclass(frozen=True)
class Want:
    """One tensor of the output: its names in the inputs of a slice, and where it stands in that slice."""

    name: str
    part: Slice
    names: tuple[str, ...]  # one for each input of the slice
    at: float


def open_mergekit(file: MergekitFile, run_dir: Path | None = None) -> Opened:
    """Open every model of the file, the base first, their vocabularies brought together as it asks."""
    opened = [open_weights(model, run_dir) for model in _addresses(file)]
    models = len(file.models())
    text, told = template_text(opened[:models], file.template)
    sources, notes = _aligned(file, opened)
    if text is not None:
        sources = [with_template(source, text) for source in sources]
    return Opened(sources, models, notes=(*notes, *told))


def plan_mergekit(file: MergekitFile, opened: Opened, max_shard_size: int, seed: int = 0) -> Plan:
    """`opened`: by `open_mergekit`. Raises one UserError with every mismatch."""
    sources = opened.sources
    index = {model: number for number, model in enumerate(file.models())}
    if file.method != "passthrough" and (told := quantised_inputs(sources[: opened.inputs])):
        raise UserError("\n".join(told))
    maker = _Maker(file, sources, index, seed)
    wants, taken = _wants(file, sources, index)
    decided = [found for want in wants if (found := maker.decide(want)) is not None]
    if maker.problems:
        names = " and ".join(f"{letter(i)} ({source.address})" for i, source in enumerate(sources))
        raise refusal(names, maker.problems, f"as {file.path} asks")
    main = index[file.base] if file.base is not None else index[file.slices[0].inputs[0].model]
    plan = assemble(
        decided,
        sources,
        main,
        max_shard_size,
        inputs=opened.inputs,
        method=file.method,
        weights=[],
        asked={"mergekit": file.values, "file": file.path, "seed": seed, "max_shard_size": max_shard_size},
        dtype=file.dtype,
        notes=[*file.notes, *opened.notes, *lineage_notes(sources)],
    )
    return plan if taken is None else replace(plan, companions=with_layers(plan.companions, taken))


def _aligned(file: MergekitFile, sources: list[WeightSource]) -> tuple[list[WeightSource], list[str]]:
    """The sources with the same rows, and notes. mergekit merges rows by number where no tokenizer_source is given."""
    if file.tokens is not None:
        first, last = ({one.model for one in file.slices[end].inputs} for end in (0, -1))
        return same_tokens(sources, _addresses(file), file.base, file.tokens, (first, last))
    try:
        return aligned(sources, None), []
    except UserError as error:
        return sources, [f"without tokenizer_source rows are merged by their numbers, and {error}"]


def _addresses(file: MergekitFile) -> list[str]:
    """Of the models, and of one that gives its tokenizer only."""
    wanted = file.tokens.source if file.tokens is not None else "base"
    return list(dict.fromkeys([*file.models(), *([wanted] if wanted not in ("base", "union") else [])]))


class _Maker:
    """Resolves tensor by tensor and collects what does not fit."""

    def __init__(
        self, file: MergekitFile, sources: Sequence[WeightSource], index: dict[str, int], seed: int
    ) -> None:
        self.problems: list[str] = []
        self._file, self._sources, self._index, self._seed = file, sources, index, seed
        self._held = [set(source.names()) for source in sources]

    def decide(self, want: Want) -> Decided | None:
        """The tensor, or None and a problem."""
        inputs = [
            (one, Term(self._index[one.model], name))
            for one, name in zip(want.part.inputs, want.names, strict=True)
        ]
        absent = [term for _, term in inputs if term.name not in self._held[term.source]]
        if absent:
            where = ", ".join(f"{letter(t.source)} ({self._sources[t.source].address})" for t in absent)
            self.problems.append(f"{want.name}: {absent[0].name} is missing in {where}")
            return None
        infos = [self._sources[term.source].info(term.name) for _, term in inputs]
        if len({shape for _, shape in infos}) > 1:
            self.problems.append(f"{want.name}: shapes {', '.join(str(list(shape)) for _, shape in infos)}")
            return None
        if not all(dtype in FLOATS for dtype, _ in infos):
            return self._same(want, [term for _, term in inputs], infos)
        try:
            blend = self._blend(want, inputs)
        except UserError as error:
            self.problems.append(f"{want.name}: {error}")
            return None
        dtype = self._file.dtype or _promoted([dtype for dtype, _ in infos])
        kept = self._file.method == "passthrough" and blend.terms[0].weight == 1
        return Decided(want.name, (dtype, infos[0][1]), "layer" if kept else "mixed", blend)

    def _same(self, want: Want, terms: list[Term], infos: list[Info]) -> Decided | None:
        """What is no float is copied, and must be the same in every input."""
        first = self._sources[terms[0].source]
        for term in terms[1:]:
            if not first.equal(want.name, self._sources[term.source]):
                self.problems.append(f"{want.name}: {infos[0][0]}, and not the same in every input")
                return None
        return Decided(want.name, infos[0], "integer", Blend("copy", (terms[0],)))

    def _blend(self, want: Want, inputs: list[tuple[Input, Term]]) -> Blend:
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
        if method in SPANNED:
            return self._spanned(want, inputs, base)
        return self._differences(want, inputs, base)

    def _spanned(self, want: Want, inputs: list[tuple[Input, Term]], base: Term | None) -> Blend:
        """Methods whose factors come from norms and angles."""
        method: Method = self._file.method  # type: ignore[assignment]
        if method == "karcher":
            steps, tol = self._shared("max_iter", want, 10), self._shared("tol", want, 1e-5)
            return Blend(
                method,
                tuple(t for _, t in inputs),
                options=(("max_iter", int(steps or 0)), ("tol", tol or 0.0)),
            )
        others = [(one, term) for one, term in inputs if term is not base]
        if method == "model_stock":
            self._refuse("filter_wise", want, False)
            return Blend(method, tuple(term for _, term in others), base)
        weights = [self._weight(want, one, term) for one, term in others]
        if method == "nuslerp":
            self._refuse("nuslerp_flatten", want, True)
            t = 0.5 if abs(sum(weights)) < 1e-6 else weights[1] / sum(weights)
            weights, options = [1.0 - t, t], [("t", t)]
        else:
            if self._shared("normalize_weights", want, 1.0):
                weights = list(normalized(weights))
            options = [("eps", self._shared("eps", want, 1e-8) or 0.0)]
        terms = (replace(term, weight=weight) for (_, term), weight in zip(others, weights, strict=True))
        return Blend(method, tuple(terms), base, tuple(options))

    def _refuse(self, key: str, want: Want, default: bool) -> None:
        """A switch that is only supported as mergekit has it by default."""
        if bool(self._shared(key, want, float(default))) is not default:
            raise UserError(
                f"{key}: {str(not default).lower()} (row by row) is not supported; leave {key} out"
            )

    def _differences(self, want: Want, inputs: list[tuple[Input, Term]], base: Term | None) -> Blend:
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
                if method == "dare_linear" and normalize and weight:
                    raise UserError("density 0 of a weighted model cannot be normalized; give weight 0")
                continue
            terms.append(replace(term, weight=weight, density=min(density, 1.0)))
        if len(gammas) > 1:
            raise UserError(
                f"gamma differs between models ({', '.join(f'{g:g}' for g in sorted(gammas))}): give one"
            )
        options |= dict.fromkeys(("gamma",) if gammas else (), max(gammas, default=0.0))
        return Blend(method, tuple(terms), base, tuple(options.items()))  # type: ignore[arg-type]

    def _weight(self, want: Want, one: Input, term: Term) -> float:
        found = self._own("weight", want, one, term, None)
        if found is None:
            raise UserError(f"parameter weight is missing for {one.model}")
        return found

    def _own(self, key: str, want: Want, one: Input, term: Term, default: float | None) -> float | None:
        """A parameter of one input: filters see the tensor's name in that input."""
        found = parameter(self._file, want.part, one, key, term.name, want.at)
        return default if found is None else float(found)

    def _shared(self, key: str, want: Want, default: float | None) -> float | None:
        """A parameter of the whole tensor: filters see its name in the output."""
        found = parameter(self._file, want.part, None, key, want.name, want.at)
        return default if found is None else float(found)


def _promoted(dtypes: Sequence[str]) -> str:
    """The dtype that holds all of them."""
    widest = max(dtypes, key=lambda dtype: WIDTH[dtype])
    return "F32" if WIDTH[widest] == 2 and len(set(dtypes)) > 1 else widest


def _wants(
    file: MergekitFile, sources: Sequence[WeightSource], index: dict[str, int]
) -> tuple[list[Want], list[int] | None]:
    """Every tensor of the output in order, and, for slices, the first source's layer that each layer comes from."""
    layers = [_layers(source) for source in sources]
    first, last = file.slices[0], file.slices[-1]
    wants = [_outside(name, first) for name in _plain_names(first, sources, index) if _is_first(name)]
    taken: list[int] = []
    for stack in _stacks(file, layers, index, sources):
        number = 0
        for part in file.slices:
            inputs = [layers[index[one.model]].get(stack, {}) for one in part.inputs]
            ranges = [one.layers or (0, len(held)) for one, held in zip(part.inputs, inputs, strict=True)]
            count = _count(file, stack, part, ranges, inputs)
            for place in range(count):
                at = place / (count - 1) if count > 1 else 1.0
                places = [start + place for start, _ in ranges]
                held = zip(inputs, places, strict=True)
                suffixes = dict.fromkeys(suffix for names, here in held for suffix in names.get(here, ()))
                for suffix in suffixes:
                    names = tuple(f"{stack}.{here}.{suffix}" for here in places)
                    wants.append(Want(f"{stack}.{number}.{suffix}", part, names, at))
                taken.append(places[0])
                number += 1
    wants += [_outside(name, last) for name in _plain_names(last, sources, index) if not _is_first(name)]
    return wants, None if file.whole else taken


def _outside(name: str, part: Slice) -> Want:
    return Want(name, part, (name,) * len(part.inputs), 0.0)


def _is_first(name: str) -> bool:
    return any(word in name for word in FIRST)


def _plain_names(part: Slice, sources: Sequence[WeightSource], index: dict[str, int]) -> list[str]:
    """Names outside layers, of every input of a slice."""
    held = (name for one in part.inputs for name in sources[index[one.model]].names())
    return list(dict.fromkeys(name for name in held if split_layer(name) is None))


def _layers(source: WeightSource) -> dict[str, dict[int, list[str]]]:
    """Stack (`model.layers`) -> layer -> the rest of its tensors' names."""
    found: dict[str, dict[int, list[str]]] = {}
    for name in source.names():
        if (parts := split_layer(name)) is not None:
            found.setdefault(parts[0], {}).setdefault(parts[1], []).append(parts[2])
    return found


def _stacks(
    file: MergekitFile,
    layers: Sequence[dict[str, dict[int, list[str]]]],
    index: dict[str, int],
    sources: Sequence[WeightSource],
) -> list[str]:
    used = [layers[index[one.model]] for part in file.slices for one in part.inputs]
    stacks = list(dict.fromkeys(stack for held in used for stack in held))
    if not file.whole and len(stacks) != 1:
        raise UserError(
            f"{file.path}: slices are for models with one stack of layers; "
            f"{sources[0].address} has {', '.join(stacks) or 'none'}"
        )
    return stacks


def _count(
    file: MergekitFile,
    stack: str,
    part: Slice,
    ranges: Sequence[tuple[int, int]],
    inputs: Sequence[dict[int, list[str]]],
) -> int:
    """Layers of a slice, the same number in every input, all of them there."""
    for one, (start, stop), held in zip(part.inputs, ranges, inputs, strict=True):
        missing = [number for number in range(start, stop) if number not in held]
        if missing:
            raise UserError(
                f"{file.path}: {one.model} has no {stack}.{missing[0]}; it has {len(held)} layers"
            )
    counts = {stop - start for start, stop in ranges}
    if len(counts) > 1:
        said = ", ".join(
            f"{one.model}: {stop - start}" for one, (start, stop) in zip(part.inputs, ranges, strict=True)
        )
        raise UserError(f"{file.path}: the inputs have different numbers of layers ({said}); write slices")
    return counts.pop()
