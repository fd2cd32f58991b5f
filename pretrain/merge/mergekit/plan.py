"""Plans a mergekit file: opens its models, renumbers layers and resolves the parameters of every tensor."""

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
from pretrain.merge.planning.assemble import assemble, mismatch_error
from pretrain.merge.planning.inputs import (
    OpenedInputs,
    align_names,
    open_all,
    quantised_inputs,
    refuse_adapters,
)
from pretrain.merge.planning.lineage import lineage_notes
from pretrain.merge.planning.rules import split_layer
from pretrain.merge.planning.settings import settings_notes
from pretrain.merge.vocabulary.align import VocabularyMismatch, aligned
from pretrain.weights.companions import with_layers
from pretrain.weights.source import WeightSource

# Substrings of the names of tensors before the first layer. All other tensors outside layers come after the last layer,
# including `embed_out`, the head of GPT-NeoX.
FIRST, LAST = ("embed", "wte", "wpe"), "embed_out"


def open_mergekit(file: MergekitFile, run_dir: Path | None = None, key: str | None = None) -> OpenedInputs:
    """Open every model of the file, the base first, and align vocabularies as the file sets it.

    key: of the state dict to read in torch files.
    """
    opened = open_all(_addresses(file), run_dir, key)
    refuse_adapters(opened)
    align_names(opened, 0)
    models = len(file.models())
    text, template_notes = chosen_template(opened[:models], file.template)
    sources, notes = _aligned(file, opened)
    if text is not None:
        sources = [with_template(source, text) for source in sources]
    return OpenedInputs(sources, models, notes=(*notes, *template_notes))


def plan_mergekit(
    file: MergekitFile, opened: OpenedInputs, max_shard_size: int, seed: int = 0, key: str | None = None
) -> Plan:
    """Plan a mergekit file whose models `open_mergekit` opened. Raises one UserError that lists every mismatch."""
    sources = opened.sources
    index = {model: number for number, model in enumerate(file.models())}
    if file.method != "passthrough" and (quantised := quantised_inputs(sources[: opened.inputs])):
        raise UserError("\n".join(quantised))
    resolver = TensorResolver(file, sources, index, seed)
    main = index[file.base] if file.base is not None else index[file.slices[0].inputs[0].model]
    tensors, taken = _output_tensors(file, sources, index, sources[main])
    planned = [found for tensor in tensors if (found := resolver.resolve(tensor)) is not None]
    if resolver.problems:
        names = " and ".join(f"{letter(i)} ({source.address})" for i, source in enumerate(sources))
        raise mismatch_error(names, resolver.problems, f"the merge is defined in {file.path}")
    ties = [
        f"the output has {tensor.name}, but its config (from {sources[main].address}) ties this tensor to {to}: a "
        "library may load that tensor instead"
        for tensor in planned
        if (to := sources[main].tied.get(tensor.name)) is not None
    ]
    plan = assemble(
        planned,
        sources,
        main,
        max_shard_size,
        inputs=opened.inputs,
        method=file.method,
        weights=[],
        request={"mergekit": file.values, "file": file.path, "seed": seed, "max_shard_size": max_shard_size}
        | ({"key": key} if key is not None else {}),
        dtype=file.dtype,
        notes=[
            *file.notes,
            *resolver.notes,
            *opened.notes,
            *ties,
            *lineage_notes(sources),
            *settings_notes(sources[: opened.inputs]),
        ],
    )
    return plan if taken is None else replace(plan, companions=with_layers(plan.companions, taken))


def _aligned(file: MergekitFile, sources: list[WeightSource]) -> tuple[list[WeightSource], list[str]]:
    """The sources with equal embedding rows, and notes. Without tokenizer_source mergekit merges rows by index."""
    if file.tokens is not None:
        first, last = ({model_input.model for model_input in file.slices[end].inputs} for end in (0, -1))
        return remap_to_tokenizer(sources, _addresses(file), file.base, file.tokens, (first, last))
    try:
        return aligned(sources, None), []
    except VocabularyMismatch as error:
        advice = "set tokenizer_source: base (or union) to merge by token"
        return sources, [f"no tokenizer_source: merges rows by index, but {error.difference}; {advice}"]


def _addresses(file: MergekitFile) -> list[str]:
    """Addresses of all models, and of the tokenizer's source if it is not one of them."""
    source = file.tokens.source if file.tokens is not None else "base"
    return list(dict.fromkeys([*file.models(), *([source] if source not in ("base", "union") else [])]))


def _output_tensors(
    file: MergekitFile, sources: Sequence[WeightSource], index: dict[str, int], main: WeightSource
) -> tuple[list[OutputTensor], list[int] | None]:
    """Return all output tensors in order and, if the file has slices, the origin of the output layers.

    The origin is, for each output layer, the number of the layer that it takes from the first model of its slice.
    main: the source of the output's config. If `main` stores a head and another model ties it, that model's embedding
          is used as its head.
    """
    layers = [_layers(source) for source in sources]
    first, last = file.slices[0], file.slices[-1]
    ends = [[sources[index[model_input.model]] for model_input in part.inputs] for part in (first, last)]
    tensors = [
        _outside_layers(name, first, ends[0]) for name in _names_outside_layers(ends[0]) if _is_first(name)
    ]
    taken: list[int] = []
    for stack in _stacks(file, layers, index, sources):
        number = 0
        for part in file.slices:
            inputs = [layers[index[model_input.model]].get(stack, {}) for model_input in part.inputs]
            ranges = [
                model_input.layers or (0, len(own_layers))
                for model_input, own_layers in zip(part.inputs, inputs, strict=True)
            ]
            count = _count(file, stack, part, ranges, inputs)
            for place in range(count):
                at = place / (count - 1) if count > 1 else 1.0
                places = [start + place for start, _ in ranges]
                pairs = zip(inputs, places, strict=True)
                suffixes = dict.fromkeys(suffix for names, here in pairs for suffix in names.get(here, ()))
                for suffix in suffixes:
                    names = tuple(f"{stack}.{here}.{suffix}" for here in places)
                    tensors.append(OutputTensor(f"{stack}.{number}.{suffix}", part, names, at))
                taken.append(places[0])
                number += 1
    stored = set(main.names())
    heads = [name for source in ends[1] for name in source.tied if name in stored]
    for name in dict.fromkeys([*_names_outside_layers(ends[1]), *heads]):
        if not _is_first(name):
            tensors.append(_outside_layers(name, last, ends[1], name in stored))
    return tensors, None if file.whole else taken


def _outside_layers(
    name: str, part: Slice, inputs: Sequence[WeightSource], through_ties: bool = False
) -> OutputTensor:
    names = (source.tied.get(name, name) if through_ties else name for source in inputs)
    return OutputTensor(name, part, tuple(names), 0.0)


def _is_first(name: str) -> bool:
    return any(word in name for word in FIRST) and LAST not in name


def _names_outside_layers(inputs: Sequence[WeightSource]) -> list[str]:
    """Names of tensors outside layers, over all inputs of a slice."""
    names = (name for source in inputs for name in source.names())
    return list(dict.fromkeys(name for name in names if split_layer(name) is None))


def _layers(source: WeightSource) -> dict[str, dict[int, list[str]]]:
    """Stack (`model.layers`) -> layer -> suffixes of the names of its tensors."""
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
    used = [layers[index[model_input.model]] for part in file.slices for model_input in part.inputs]
    stacks = list(dict.fromkeys(stack for held in used for stack in held))
    if not file.whole and len(stacks) != 1:
        raise UserError(
            f"{file.path}: slices need models with one stack of layers; "
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
    """Number of layers of a slice. Raises UserError if a layer is missing or the inputs have different numbers."""
    for model_input, (start, stop), held in zip(part.inputs, ranges, inputs, strict=True):
        missing = next((number for number in range(start, stop) if number not in held), None)
        if missing is not None:
            raise UserError(
                f"{file.path}: {model_input.model} has no {stack}.{missing}; it has {len(held)} layers"
            )
    counts = {stop - start for start, stop in ranges}
    if len(counts) > 1:
        listed = ", ".join(
            f"{model_input.model}: {stop - start}"
            for model_input, (start, stop) in zip(part.inputs, ranges, strict=True)
        )
        raise UserError(f"{file.path}: the inputs have different numbers of layers ({listed}); write slices")
    return counts.pop()
