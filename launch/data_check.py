"""Whether the data of a recipe's stages is there and can be read, seen before anything is written."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

from data_pipeline import storage
from data_pipeline.errors import ReadError, UserError
from pretrain.recipe.schema import MergeStage, Recipe, TrainStage

# Where `dromos data prepare` writes; what lies elsewhere is not made by it.
PREPARED = "data/demo"
DECODERS = ("simplejpeg", "PIL", "tokenizers")


def source_paths(stage: TrainStage | MergeStage) -> Iterator[tuple[str, str]]:
    """(key, path) of everything that a stage reads: its streams' sources, then what it is evaluated on."""
    if isinstance(stage, TrainStage):
        for name, stream in stage.data.items():
            for source, spec in stream.sources.items():
                yield f"data.{name}.sources.{source}", spec.path
    for kind, tasks in (("zero_shot", stage.eval.zero_shot), ("perplexity", stage.eval.perplexity)):
        for name, task in tasks.items():
            yield f"eval.{kind}.{name}.path", task.path


def missing_sources(
    recipe: Recipe, stages: Iterable[str], remote: bool = True
) -> Iterator[tuple[str, str, str, str]]:
    """(stage, key, path, what is wrong) of each path that holds no tars, once, where it is named first.

    Without `remote`, those in object stores are taken to be there.
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
    """True if `dromos data prepare` of this recipe makes what is at `path`."""
    return recipe.prepare is not None and PurePosixPath(path).is_relative_to(PREPARED)


def check_contents(recipe: Recipe, stages: Iterable[str], remote: bool = True) -> None:
    """UserError that names stage and source where the first samples of a source cannot be trained on."""
    from data_pipeline.batches.batch_builder import BatchBuilder
    from data_pipeline.batches.spec import SourceSpec
    from pretrain.build.streams import stream_spec

    seen: list[object] = []
    for name in stages:
        stage = recipe.stages[name]
        for key, stream in stage.data.items() if isinstance(stage, TrainStage) else ():
            content = stream.model_copy(update={"order_as": None})
            if content in seen:
                continue
            seen.append(content)
            spec = stream_spec(key, stream, recipe.run.seed, name)
            if not remote and any(storage.is_remote(source.path) for source in spec.sources.values()):
                local = [source for source, at in spec.sources.items() if not storage.is_remote(at.path)]
                if not local:
                    continue
                # Without its shares, which may not go together where some sources are left out.
                bare = {
                    source: SourceSpec(spec.sources[source].path, view=spec.sources[source].view)
                    for source in local
                }
                spec = dataclasses.replace(spec, sources=bare)
            try:
                builder = BatchBuilder(spec)
                try:
                    builder.check()
                finally:
                    builder.close()
            except (UserError, ReadError) as error:
                raise UserError(f"stage {name}: {error}") from None


def can_decode() -> bool:
    """False in an installation without the `train` extra, which submits jobs and does not train."""
    return all(importlib.util.find_spec(name) is not None for name in DECODERS)
