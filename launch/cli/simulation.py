"""The load of a recipe's streams on so many nodes."""

from __future__ import annotations

from data_pipeline.batches.batch_builder import open_sources
from data_pipeline.batches.work_items import check_ranks
from data_pipeline.errors import UserError
from data_pipeline.loader.simulate import StreamLoad, simulate
from data_pipeline.storage.cache import MOST_GIGABYTES
from pretrain.build.streams import stream_spec
from pretrain.recipe.load import load_recipe, only_training_stage
from pretrain.recipe.schema import TrainStage


def loads_of(path: str, stage: str | None, nodes: int, ranks: int) -> tuple[float, list[StreamLoad]]:
    """Bytes of the cache of a node, and the load of each stream. Raises UserError."""
    name = stage or only_training_stage(path)
    recipe = load_recipe(path, runnable=False)
    chosen = recipe.stages.get(name)
    if not isinstance(chosen, TrainStage):
        training = [key for key, one in recipe.stages.items() if isinstance(one, TrainStage)]
        raise UserError(
            f"{path}: {name} is no training stage; write --stage with one of {', '.join(training)}"
        )
    specs = [stream_spec(key, stream, recipe.run.seed, name) for key, stream in chosen.data.items()]
    check_ranks(specs, nodes * ranks)
    gigabytes = chosen.loader.cache.gigabytes
    limit = (MOST_GIGABYTES if gigabytes is None else gigabytes) * 1e9
    return limit, [simulate(spec, open_sources(spec), nodes, int(limit)) for spec in specs]
