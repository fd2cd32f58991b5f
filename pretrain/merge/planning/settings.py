"""Settings of the inputs that no tensor shows: other activations, position encodings or head counts are noted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipeline.errors import UserError
from pretrain.merge.merge_plan import letter
from pretrain.run.address import model_stage
from pretrain.run.folder import read_record
from pretrain.weights.companions import CONFIG, read_companion
from pretrain.weights.folder import parse_json
from pretrain.weights.source import WeightSource

OPEN_CLIP = "open_clip_config.json"
# Keys under which equal tensors compute something else.
KEYS = (
    "model_type", "hidden_act", "hidden_activation", "activation_function", "hidden_act_fn", "quick_gelu",
    "rope_theta", "rope_parameters", "rope_scaling", "partial_rotary_factor", "num_attention_heads", "n_head",
    "num_key_value_heads", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "sliding_window",
    "scale_embedding", "logit_scale", "position_embedding_type",
)  # fmt: skip


def settings_notes(sources: Sequence[WeightSource]) -> list[str]:
    """A note for each setting whose value differs between inputs that have it."""
    found = [dict(_settings(source)) for source in sources]
    notes = []
    for key in dict.fromkeys(key for settings in found for key in settings):
        having = [i for i, settings in enumerate(found) if key in settings]
        if len({json.dumps(found[i][key], sort_keys=True) for i in having}) > 1:
            listed = ", ".join(f"{json.dumps(found[i][key])} in {letter(i)}" for i in having)
            notes.append(
                f"{key} differs: {listed}; weights that were trained with different settings rarely merge into a good "
                "model"
            )
    return notes


def export_notes(source: WeightSource) -> list[str]:
    """A note if the output's model is a stage of a CLIP model: open_clip needs a config that a stage does not have."""
    stage_dir = source.located.stage_dir
    stage = model_stage(stage_dir) if stage_dir is not None else None
    record = read_record(stage, any_schema=True) if stage is not None else None
    objective = record["stage"].get("objective") if record is not None else None
    if (
        not isinstance(objective, dict)
        or objective.get("kind") != "contrastive"
        or OPEN_CLIP in source.companions
    ):
        return []
    return [
        "open_clip does not load the output itself; dromos export OUT --format open_clip --out DIR writes a "
        "folder that it loads"
    ]


def _settings(source: WeightSource) -> Iterator[tuple[str, Any]]:
    """Path and value of every key of KEYS in the configs beside a source; a damaged config has none."""
    for name in (CONFIG, OPEN_CLIP):
        if (content := source.companions.get(name)) is None:
            continue
        try:
            yield from _below(parse_json(read_companion(content), name), "")
        except UserError:
            continue


def _below(config: Any, path: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items() if isinstance(config, Mapping) else ():
        if key in KEYS:
            yield f"{path}{key}", value
        elif isinstance(value, Mapping) and path.count(".") < 3:
            yield from _below(value, f"{path}{key}.")
