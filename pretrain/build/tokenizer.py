"""The tokenizer of a training stage, and the check that all its streams use it and fit into the language model."""

from __future__ import annotations

from collections.abc import Mapping

from data_pipeline.batches.batch_builder import BatchBuilder
from data_pipeline.errors import UserError
from data_pipeline.transforms.tokenizers import Tokenizer, load_tokenizer
from pretrain.objectives.base import Objective
from pretrain.recipe.lengths import main_stream
from pretrain.recipe.schema import TrainStage


def tokenizer_name(stage: TrainStage) -> str:
    """The tokenizer of a stage: that of the language model, else that of the main stream. Raises UserError."""
    name = _tokenizer_name(stage)
    if name is None:
        raise UserError("model.llm.tokenizer is missing, and no stream of the stage has a tokenizer either")
    return name


def _tokenizer_name(stage: TrainStage) -> str | None:
    if stage.model.llm is not None and stage.model.llm.tokenizer:
        return stage.model.llm.tokenizer
    text = stage.data[main_stream(stage)].text
    return text.tokenizer_name if text is not None else None


def stage_tokenizer(stage: TrainStage) -> Tokenizer:
    """The tokenizer that `tokenizer_name` names. Raises UserError."""
    return load_tokenizer(tokenizer_name(stage))


def optional_tokenizer(stage: TrainStage) -> Tokenizer | None:
    """The same; None if no part of the stage names a tokenizer, as where text has a format of its own."""
    name = _tokenizer_name(stage)
    return load_tokenizer(name) if name is not None else None


def check_tokens(stage: TrainStage, objective: Objective, builders: Mapping[str, BatchBuilder]) -> None:
    """Raise UserError unless all streams use the stage's tokenizer and their rows fit into the language model."""
    tokenizer = optional_tokenizer(stage)
    for name, builder in builders.items():
        if tokenizer is not None:
            _check_tokenizer(name, builder, tokenizer.fingerprint, tokenizer_name(stage))
        _check_row_length(name, builder, objective)


def _check_tokenizer(name: str, builder: BatchBuilder, fingerprint: str, tokenizer: str) -> None:
    """Compare the tokenizers of a stream, and of its packed sources, with the stage's."""
    used: dict[str, str] = {}
    if builder.tokenizer is not None:
        used[f"data.{name}.text.tokenizer"] = builder.tokenizer.fingerprint
    used |= {
        f"data.{name}.sources.{source} (packed with another tokenizer)": manifest.tokenizer
        for source, manifest in builder.manifests.items()
        if manifest.tokenizer
    }
    for where, other in used.items():
        if other != fingerprint:
            raise UserError(
                f"{where}: its tokenizer (hash {other}) is not the stage's, {tokenizer} (hash {fingerprint}); "
                f"use one tokenizer for the whole stage, or pack the text again"
            )


def _check_row_length(name: str, builder: BatchBuilder, objective: Objective) -> None:
    """Compare the longest row of a stream, visual tokens included, with max_position_embeddings."""
    limit = objective.max_length
    if limit is None:
        return
    visual = objective.visual_tokens(name)
    text = builder.spec.text.length if builder.spec.text else 0
    if visual + text > limit:
        raise UserError(
            f"data.{name}: a row has {visual} visual and {text} text tokens, model.llm.config."
            f"max_position_embeddings is {limit}; make it at least {visual + text}"
        )
