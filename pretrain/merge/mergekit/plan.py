"""From mergekit's YAML and the models it names to a plan: layers renumbered, parameters resolved for every tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_pipeline.errors import UserError
from pretrain.merge.merge_plan import Plan, letter
from pretrain.merge.mergekit.chat_template import chosen_template, with_template
from pretrain.merge.mergekit.tensor_recipe import OutputTensor, TensorResolver
from pretrain.merge.mergekit.vocabulary import remap_to_tokenizer
from pretrain.merge.mergekit.yaml_file import MergekitFile, Slice
from pretrain.merge.planning.assemble import assemble, refusal
from pretrain.merge.planning.inputs import OpenedInputs, quantised_inputs
from pretrain.merge.planning.lineage import lineage_notes
from pretrain.merge.planning.rules import split_layer
from pretrain.merge.vocabulary.align import ADVICE, aligned
from pretrain.weights.companions import with_layers
from pretrain.weights.source import WeightSource, open_weights

FIRST, LAST = ("embed", "wte", "wpe"), "embed_out"
"""parts of the names of tensors that stand before the layers; the others outside layers, and GPT-NeoX's head, stand
after them"""


def open_mergekit(file: MergekitFile, run_dir: Path | None = None) -> OpenedInputs:
    """Open every model of the file, the base first, their vocabularies brought together as it asks."""
    opened = [open_weights(model, run_dir) for model in _addresses(file)]
    models = len(file.models())
    text, told = chosen_template(opened[:models], file.template)
    sources, notes = _aligned(file, opened)
    if text is not None:
        sources = [with_template(source, text) for source in sources]
    return OpenedInputs(sources, models, notes=(*notes, *told))


def plan_mergekit(file: MergekitFile, opened: OpenedInputs, max_shard_size: int, seed: int = 0) -> Plan:
    """`opened`: by `open_mergekit`. Raises one UserError with every mismatch."""
    sources = opened.sources
    index = {model: number for number, model in enumerate(file.models())}
    if file.method != "passthrough" and (told := quantised_inputs(sources[: opened.inputs])):
        raise UserError("\n".join(told))
    resolver = TensorResolver(file, sources, index, seed)
    main = index[file.base] if file.base is not None else index[file.slices[0].inputs[0].model]
    wants, taken = _wants(file, sources, index, sources[main])
    decided = [found for want in wants if (found := resolver.decide(want)) is not None]
    if resolver.problems:
        names = " and ".join(f"{letter(i)} ({source.address})" for i, source in enumerate(sources))
        raise refusal(names, resolver.problems, f"as {file.path} asks")
    ties = [
        f"{one.name} is written, and the config, that of {sources[main].address}, ties it to {to}: who loads the model "
        "may get that instead"
        for one in decided
        if (to := sources[main].tied.get(one.name)) is not None
    ]
    plan = assemble(
        decided,
        sources,
        main,
        max_shard_size,
        inputs=opened.inputs,
        method=file.method,
        weights=[],
        request={"mergekit": file.values, "file": file.path, "seed": seed, "max_shard_size": max_shard_size},
        dtype=file.dtype,
        notes=[*file.notes, *opened.notes, *ties, *lineage_notes(sources)],
    )
    return plan if taken is None else replace(plan, companions=with_layers(plan.companions, taken))


def _aligned(file: MergekitFile, sources: list[WeightSource]) -> tuple[list[WeightSource], list[str]]:
    """The sources with the same rows, and notes. mergekit merges rows by number where no tokenizer_source is given."""
    if file.tokens is not None:
        first, last = ({one.model for one in file.slices[end].inputs} for end in (0, -1))
        return remap_to_tokenizer(sources, _addresses(file), file.base, file.tokens, (first, last))
    try:
        return aligned(sources, None), []
    except UserError as error:
        why = str(error).removesuffix(f"; {ADVICE}")
        advice = "tokenizer_source: base (or union) goes by token"
        return sources, [f"without tokenizer_source rows are merged by their numbers, and {why}; {advice}"]


def _addresses(file: MergekitFile) -> list[str]:
    """Of the models, and of one that gives its tokenizer only."""
    wanted = file.tokens.source if file.tokens is not None else "base"
    return list(dict.fromkeys([*file.models(), *([wanted] if wanted not in ("base", "union") else [])]))


def _wants(
    file: MergekitFile, sources: Sequence[WeightSource], index: dict[str, int], main: WeightSource
) -> tuple[list[OutputTensor], list[int] | None]:
    """Every tensor of the output in order, and, for slices, the first source's layer that each layer comes from.

    main: whose config the output has. A head that it stores, and another model ties, is that model's embedding.
    """
    layers = [_layers(source) for source in sources]
    first, last = file.slices[0], file.slices[-1]
    ends = [[sources[index[one.model]] for one in part.inputs] for part in (first, last)]
    wants = [_outside(name, first, ends[0]) for name in _plain_names(ends[0]) if _is_first(name)]
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
                    wants.append(OutputTensor(f"{stack}.{number}.{suffix}", part, names, at))
                taken.append(places[0])
                number += 1
    stored = set(main.names())
    heads = [name for source in ends[1] for name in source.tied if name in stored]
    for name in dict.fromkeys([*_plain_names(ends[1]), *heads]):
        if not _is_first(name):
            wants.append(_outside(name, last, ends[1], name in stored))
    return wants, None if file.whole else taken


def _outside(
    name: str, part: Slice, inputs: Sequence[WeightSource], through_ties: bool = False
) -> OutputTensor:
    names = (source.tied.get(name, name) if through_ties else name for source in inputs)
    return OutputTensor(name, part, tuple(names), 0.0)


def _is_first(name: str) -> bool:
    return any(word in name for word in FIRST) and LAST not in name


def _plain_names(inputs: Sequence[WeightSource]) -> list[str]:
    """Names outside layers, of every input of a slice."""
    held = (name for source in inputs for name in source.names())
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
        missing = next((number for number in range(start, stop) if number not in held), None)
        if missing is not None:
            raise UserError(f"{file.path}: {one.model} has no {stack}.{missing}; it has {len(held)} layers")
    counts = {stop - start for start, stop in ranges}
    if len(counts) > 1:
        said = ", ".join(
            f"{one.model}: {stop - start}" for one, (start, stop) in zip(part.inputs, ranges, strict=True)
        )
        raise UserError(f"{file.path}: the inputs have different numbers of layers ({said}); write slices")
    return counts.pop()
