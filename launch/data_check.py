"""Checks that the sources of a recipe's stages exist and that their first samples can be used."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from data_pipeline import storage
from data_pipeline.errors import ReadError, UserError
from pretrain.recipe.schema import MergeStage, Recipe, TrainStage

# The folder that `dromos data prepare` writes.
PREPARED = "data/demo"
# Packages that decoding needs; they come with the `train` extra.
DECODERS = ("simplejpeg", "PIL", "tokenizers")


def source_paths(stage: TrainStage | MergeStage) -> Iterator[tuple[str, str]]:
    """(key, path) of all data that a stage reads: sources of its streams, then its evaluation sets."""
    if isinstance(stage, TrainStage):
        for name, stream in stage.data.items():
            for source, spec in stream.sources.items():
                yield f"data.{name}.sources.{source}", spec.path
    for section, name, task in stage.eval.tasks():
        yield f"eval.{section}.{name}.path", task.path


def missing_sources(
    recipe: Recipe, stages: Iterable[str], remote: bool = True
) -> Iterator[tuple[str, str, str, str]]:
    """Yields (stage, key, path, error) for each path that has no tars.

    A path that several keys name is reported once, for the first of them. Without `remote`, paths in object stores are
    assumed to exist.
    """
    seen: set[str] = set()
    for name in stages:
        for key, path in source_paths(recipe.stages[name]):
            if path in seen or (storage.is_remote(path) and not remote):
                continue
            seen.add(path)
            try:
                storage.list_shards(path)
            except UserError as error:
                yield name, key, path, str(error)


def is_prepared(path: str, recipe: Recipe) -> bool:
    """True if `dromos data prepare` of this recipe writes the data at `path`."""
    return recipe.prepare is not None and PurePosixPath(path).is_relative_to(PREPARED)


def check_contents(recipe: Recipe, stages: Iterable[str], remote: bool = True) -> None:
    """Read and decode the first samples of every source; equal streams are checked once.

    Without `remote`, sources in object stores are skipped. Raises UserError with stage and source.
    """
    from data_pipeline.batches.batch_builder import BatchBuilder
    from data_pipeline.batches.spec import SourceSpec
    from pretrain.build.streams import stream_spec

    checked: list[object] = []
    for name in stages:
        stage = recipe.stages[name]
        for key, stream in stage.data.items() if isinstance(stage, TrainStage) else ():
            content = stream.model_copy(update={"order_as": None})
            if content in checked:
                continue
            checked.append(content)
            spec = stream_spec(key, stream, recipe.run.seed, name)
            if not remote and any(storage.is_remote(source.path) for source in spec.sources.values()):
                local = [source for source, at in spec.sources.items() if not storage.is_remote(at.path)]
                if not local:
                    continue
                # Drop the weights: they may be inconsistent once some sources are left out.
                unweighted = {
                    source: SourceSpec(spec.sources[source].path, view=spec.sources[source].view)
                    for source in local
                }
                spec = dataclasses.replace(spec, sources=unweighted)
            try:
                builder = BatchBuilder(spec)
                try:
                    builder.check()
                finally:
                    builder.close()
            except (UserError, ReadError) as error:
                raise UserError(f"stage {name}: {error}") from None


def can_decode() -> bool:
    """True if the packages that decode are installed. A machine that only submits may lack the `train` extra."""
    return all(importlib.util.find_spec(name) is not None for name in DECODERS)
