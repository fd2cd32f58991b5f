"""mergekit's YAML as plain data. Unsupported features are refused by name.

mergekit's README (github.com/arcee-ai/mergekit) documents the format; the behaviour was compared with version 0.1.5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from pretrain.merge.mergekit.tokens import TokenizerRule, parse_tokenizer_rule, refuse_unknown_keys
from pretrain.merge.planning.request import check_dtype

Settings = Mapping[str, Any]
MERGEKIT_BASE_METHODS = (
    "ties",
    "dare_linear",
    "dare_ties",
    "task_arithmetic",
    "breadcrumbs",
    "breadcrumbs_ties",
)
GEOMETRIC_METHODS = ("nuslerp", "multislerp", "karcher", "model_stock")
METHODS = ("linear", "slerp", *MERGEKIT_BASE_METHODS, *GEOMETRIC_METHODS, "sce", "passthrough")
# Method -> its parameters. Other parameters have no effect; a note lists them.
PARAMETERS: dict[str, tuple[str, ...]] = {
    "linear": ("weight", "normalize"),
    "slerp": ("t",),
    "passthrough": ("scale",),
    **dict.fromkeys(
        MERGEKIT_BASE_METHODS, ("weight", "density", "normalize", "rescale", "lambda", "int8_mask")
    ),
    **dict.fromkeys(
        MERGEKIT_BASE_METHODS[-2:],
        ("weight", "density", "gamma", "normalize", "rescale", "lambda", "int8_mask"),
    ),
    "nuslerp": ("weight", "nuslerp_flatten", "nuslerp_row_wise"),
    "multislerp": ("weight", "normalize_weights", "eps"),
    "karcher": ("max_iter", "tol"),
    "model_stock": ("filter_wise",),
    "sce": ("select_topk", "int8_mask"),
}
TOP = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "chat_template", "name",
)  # fmt: skip


@dataclass(frozen=True)
class Input:
    """One model of a slice: its address and its layers [start, stop); None means all layers."""

    model: str
    layers: tuple[int, int] | None
    parameters: Settings


@dataclass(frozen=True)
class Slice:
    """Consecutive layers of the output, merged from equal numbers of layers of the inputs."""

    inputs: tuple[Input, ...]
    base: str | None
    parameters: Settings


@dataclass(frozen=True)
class MergekitFile:
    """A merge in mergekit's terms.

    whole:    the file lists `models`, so one slice covers all layers.
    module:   parameters of the only module; they take precedence over the file's.
    tokens:   the tokenizer rule of the output; None keeps the rows of every tensor.
    template: the value of chat_template.
    values:   content of the file.
    """

    path: str
    method: str
    slices: tuple[Slice, ...]
    whole: bool
    base: str | None
    parameters: Settings
    module: Settings
    dtype: str | None
    tokens: TokenizerRule | None
    template: str | None
    values: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())

    def models(self) -> list[str]:
        """All addresses without duplicates: bases first, then in file order."""
        named = [model_input.model for part in self.slices for model_input in part.inputs]
        bases = [base for base in (self.base, *(part.base for part in self.slices)) if base is not None]
        return list(dict.fromkeys([*bases, *named]))


def is_mergekit(values: Mapping[str, Any]) -> bool:
    """True if a YAML mapping is a mergekit file, not a dromos spec."""
    return "merge_method" in values


def parse(path: str, values: Mapping[str, Any]) -> MergekitFile:
    """Parse a mergekit file. Raises UserError with the key that is missing or not supported.

    Keys and parameters that mergekit silently ignores are ignored with a note.
    """
    where = f"{path} (mergekit)"
    notes: list[str] = []
    _note_unknown_keys(notes, "", values, TOP)
    method = values.get("merge_method")
    if method not in METHODS:
        raise UserError(f"{where}: merge_method {method!r} is not supported; supported: {', '.join(METHODS)}")
    base = _model(where, values["base_model"]) if values.get("base_model") is not None else None
    body, module = _body(where, values, notes)
    whole = body.get("models") is not None
    if whole:
        slices = [_whole_slice(where, body["models"], base, notes)]
    else:
        slices = [_slice(where, entry, base, notes) for entry in _list(where, "slices", body["slices"])]
    for part in slices:
        _check_slice(where, part, method)
    settings = [_parameters(where, values.get("parameters")), _parameters(where, module)]
    settings += [part.parameters for part in slices]
    settings += [model_input.parameters for part in slices for model_input in part.inputs]
    for name in sorted({str(name) for each in settings for name in each} - set(PARAMETERS[method])):
        notes.append(f"parameter {name} has no effect with {method}")
    if any("int8_mask" in each for each in settings):
        notes.append("int8_mask saves memory in mergekit; it has no effect here")
    if method.startswith("dare"):
        notes.append(
            "DARE drops as many entries as mergekit, but different ones: the draw depends on --seed and the tensor"
        )
    template = values.get("chat_template")
    if template is not None and (not isinstance(template, str) or not template):
        raise UserError(
            f"{where}: chat_template {template!r} is not a template; write auto or the template itself"
        )
    return MergekitFile(
        path=path,
        method=method,
        slices=tuple(slices),
        whole=whole,
        base=base,
        parameters=settings[0],
        module=settings[1],
        dtype=_dtype(where, values),
        tokens=parse_tokenizer_rule(where, values, lambda value: _model(where, value)),
        template=template,
        values=values,
        notes=tuple(notes),
    )


def _body(where: str, values: Mapping[str, Any], notes: list[str]) -> tuple[Mapping[str, Any], Any]:
    """Return the mapping with models or slices (the file or its only module), and the module's parameters."""
    keys = [key for key in ("models", "slices", "modules") if values.get(key) is not None]
    if len(keys) != 1:
        raise UserError(f"{where}: write exactly one of models, slices and modules")
    if keys != ["modules"]:
        return values, None
    modules = values["modules"]
    if not isinstance(modules, dict) or not modules or not all(isinstance(m, dict) for m in modules.values()):
        raise UserError(f"{where}: modules must be a map from names to models or slices")
    if len(modules) > 1:
        raise UserError(
            f"{where}: modules {', '.join(map(str, modules))}: several modules are not supported; write models, which "
            "merges all parts, or a dromos spec with rules by name"
        )
    (inner,) = modules.values()
    if (inner.get("models") is None) == (inner.get("slices") is None):
        raise UserError(f"{where}: modules: write exactly one of models and slices")
    _note_unknown_keys(notes, "modules: ", inner, ("models", "slices", "parameters"))
    return inner, inner.get("parameters")


def _dtype(where: str, values: Mapping[str, Any]) -> str | None:
    """Dtype of the output: out_dtype, else dtype. mergekit also computes in `dtype`; this tool computes exact sums."""
    dtype = None
    for key in ("dtype", "out_dtype"):
        if values.get(key) is not None:
            try:
                dtype = check_dtype(str(values[key]))
            except UserError:
                raise UserError(f"{where}: {key} {values[key]!r} is not supported") from None
    return dtype


def _whole_slice(where: str, models: Any, base: str | None, notes: list[str]) -> Slice:
    inputs = []
    for entry in _list(where, "models", models):
        _note_unknown_keys(notes, "models: ", entry, ("model", "parameters"))
        _refuse_revision(where, entry)
        inputs.append(Input(_model_of_entry(where, entry), None, _parameters(where, entry.get("parameters"))))
    if base is not None and base not in [model_input.model for model_input in inputs]:
        inputs.append(Input(base, None, {}))  # mergekit does this for every method
    return Slice(tuple(inputs), base, {})


def _slice(where: str, entry: Any, base: str | None, notes: list[str]) -> Slice:
    _note_unknown_keys(notes, "slices: ", entry, ("sources", "base_model", "parameters"))
    inputs = []
    for source in _list(where, "sources", entry.get("sources")):
        _note_unknown_keys(notes, "sources: ", source, ("model", "layer_range", "parameters"))
        _refuse_revision(where, source)
        layers = source.get("layer_range")
        if not (
            isinstance(layers, list)
            and len(layers) == 2
            and all(type(number) is int for number in layers)
            and 0 <= layers[0] < layers[1]
        ):
            raise UserError(
                f"{where}: layer_range {layers!r}: must be two numbers, the first layer and the one after the last"
            )
        settings = _parameters(where, source.get("parameters"))
        inputs.append(Input(_model_of_entry(where, source), (layers[0], layers[1]), settings))
    lengths = {
        model_input.layers[1] - model_input.layers[0]
        for model_input in inputs
        if model_input.layers is not None
    }
    if len(lengths) > 1:
        raise UserError(
            f"{where}: the sources of a slice have different numbers of layers: {sorted(lengths)}"
        )
    slice_base = entry.get("base_model")
    return Slice(
        tuple(inputs),
        _model(where, slice_base) if slice_base is not None else base,
        _parameters(where, entry.get("parameters")),
    )


def _check_slice(where: str, part: Slice, method: str) -> None:
    models = [model_input.model for model_input in part.inputs]
    if len(set(models)) != len(models):
        raise UserError(f"{where}: a model occurs twice among the inputs of a slice")
    if method in (*MERGEKIT_BASE_METHODS, "slerp", "model_stock", "sce"):
        if part.base is None:
            raise UserError(f"{where}: {method} needs base_model")
        if part.base not in models:
            raise UserError(f"{where}: base_model {part.base} is not among the sources of a slice")
    if method == "slerp" and len(models) != 2:
        raise UserError(
            f"{where}: slerp merges base_model and one other model, but {len(models)} models are given"
        )
    others = len([model for model in models if model != part.base])
    if method == "nuslerp" and others != 2:
        raise UserError(f"{where}: nuslerp merges two models besides base_model, but {others} are given")
    if method == "model_stock" and others < 2:
        raise UserError(
            f"{where}: model_stock merges at least two models besides base_model, but {others} are given"
        )
    if method == "passthrough" and len(models) != 1:
        raise UserError(f"{where}: passthrough needs one source per slice, but {len(models)} are given")


def _parameters(where: str, value: Any) -> Settings:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: parameters must be a map of names")
    return value


def _model_of_entry(where: str, entry: Mapping[str, Any]) -> str:
    if "model" not in entry:
        raise UserError(f"{where}: an input has no model")
    return _model(where, entry["model"])


def _model(where: str, value: Any) -> str:
    """Turn a model reference of mergekit into an address: an existing path, else a hub repository."""
    if isinstance(value, dict):
        refuse_unknown_keys(f"{where}: model", value, ("model", "path", "revision"))
        inner = value.get("model", value)
        if isinstance(inner, dict):
            refuse_unknown_keys(f"{where}: model", inner, ("path", "revision"))
            path, revision = inner.get("path"), f"@{inner['revision']}" if inner.get("revision") else ""
            return _model(where, f"{path}{revision}" if isinstance(path, str) else path)
        return _model(where, inner)
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: model {value!r} is not a path")
    if Path(value).expanduser().exists() or "://" in value:
        return value
    if "+" in value:
        raise UserError(
            f"{where}: model {value}: adapters (LoRA) are not supported; first merge them into the model"
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", value) and not value.startswith("."):
        return f"hf://{value}"
    return value


def _note_unknown_keys(notes: list[str], at: str, value: Mapping[str, Any], known: tuple[str, ...]) -> None:
    notes += [
        note
        for key in value
        if key not in known
        and (note := f"{at}{key} is not a key of mergekit and is ignored, as in mergekit") not in notes
    ]


def _refuse_revision(where: str, entry: Mapping[str, Any]) -> None:
    """Raises UserError for a `revision` beside `model`: mergekit ignores it and would load another model."""
    if "revision" in entry:
        named = f"{entry.get('model')}@{entry['revision']}"
        raise UserError(
            f"{where}: revision is not a valid key beside model (mergekit ignores it); write {named}"
        )


def _list(where: str, key: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) for entry in value):
        raise UserError(f"{where}: {key} must be a list of maps")
    return value
