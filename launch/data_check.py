"""Checks that the sources of a recipe's stages exist and that their first samples can be used."""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import PurePosixPath

from data_pipeline import storage
from data_pipeline.errors import ReadError, UserError
from pretrain.recipe.schema import MergeStage, Recipe, TrainStage

# The folder that `dromos data prepare` writes.
PREPARED = "data/demo"
MAX_SCANNED_BYTES = 256 << 20  # of tars without an index, whose headers `recipe check` reads
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
    """Yields (stage, key, path, error) for each path that has no tars, or whose address is not read.

    A path that several keys name is reported once, for the first of them. Without `remote`, paths in object stores are
    assumed to exist.
    """
    for name, key, path in _distinct_paths(recipe, stages):
        try:
            if storage.is_remote(storage.normal(path)):
                if remote:
                    storage.list_shards(path)
            else:
                shards = storage.list_shards(path)
                from data_pipeline.sources.manifest import shard_lengths  # imports numpy

                shard_lengths(shards, path)
        except UserError as error:
            yield name, key, path, str(error)


def source_warnings(recipe: Recipe, stages: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """Yields (stage, key, sentence) about what sources on this machine hold that training does not read, or cannot.

    The headers of tars without an index are read only if the tars are small: they say what no other file does.
    """
    for name, key, path in _distinct_paths(recipe, stages):
        with suppress(UserError):  # missing_sources names it
            if storage.is_remote(storage.normal(path)):
                continue
            shards = storage.list_shards(path)
            # Imported where there is a source: it imports numpy.
            from data_pipeline.sources.manifest import INDEX_FOLDER, SourceError, open_source, shard_lengths

            size = sum(shard_lengths(shards, path).values())
            if size > MAX_SCANNED_BYTES and not storage.exists(
                storage.join(storage.root_of(path), f"{INDEX_FOLDER}/shards.parquet")
            ):
                for sentence, _ in storage.unread_files(path).sentences(path):
                    yield name, key, sentence
                continue
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    open_source(key.rpartition(".")[2], path)
                except SourceError as error:
                    yield name, key, error.reason
            for warning in caught:
                yield name, key, str(warning.message)


def _distinct_paths(recipe: Recipe, stages: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(stage, key, path) of the data of stages; a path that several keys name only for the first of them."""
    seen: set[str] = set()
    for name in stages:
        for key, path in source_paths(recipe.stages[name]):
            if path not in seen:
                seen.add(path)
                yield name, key, path


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
