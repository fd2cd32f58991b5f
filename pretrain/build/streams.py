"""Converts the `data` section of a recipe to the StreamSpecs of the data pipeline."""

from __future__ import annotations

from data_pipeline.batches.spec import SourceSpec, StreamSpec
from data_pipeline.order.stream_order import stream_seed
from data_pipeline.storage.cache import CacheSettings
from data_pipeline.transforms.decode import ImageSpec
from data_pipeline.transforms.text_formats import PackedFormat, TextFormat
from pretrain.recipe.schema import TrainStage
from pretrain.recipe.sections.data import Image, Stream
from pretrain.recipe.sections.evaluation import Task


def stream_spec(name: str, stream: Stream, run_seed: int, stage: str) -> StreamSpec:
    """One stream of a stage. `order_as` gives it the order, crops and masks of another stage."""
    return StreamSpec(
        name=name,
        seed=stream_seed(run_seed, stream.order_as or stage, name),
        sources={key: SourceSpec(**source.model_dump()) for key, source in stream.sources.items()},
        batch=stream.batches,
        lanes=stream.lanes,
        image=image_spec(stream.image) if stream.image else None,
        text=stream.text.row_format() if stream.text else None,
        share_by=stream.share_by,
    )


def image_spec(image: Image) -> ImageSpec:
    """Image settings of the workers; normalisation by mean and std is done on the device."""
    return ImageSpec(image.size, image.crop, image.flip, image.max_pixels)


def stage_specs(stage: TrainStage, run_seed: int, name: str, streams: tuple[str, ...]) -> list[StreamSpec]:
    """StreamSpecs of the streams that the objective trains on, in its order."""
    return [stream_spec(key, stage.data[key], run_seed, name) for key in streams]


def evaluation_spec(
    name: str, task: Task, stream: Stream | None, batch: int, length: int | None = None
) -> StreamSpec:
    """A held-out source as a stream, with the image and text settings of the training stream `stream`.

    Without `stream` it is packed text of `length` tokens.
    """
    image = stream.image if stream is not None else None
    text: TextFormat | None = PackedFormat(length) if stream is None and length is not None else None
    if stream is not None and stream.text is not None:
        text = stream.text.row_format()
    return StreamSpec(
        name=name,
        seed=0,
        sources={name: SourceSpec(path=task.path)},
        batch=batch,
        lanes=None,
        image=ImageSpec(image.size, max_pixels=image.max_pixels) if image else None,
        text=text,
    )


def cache_settings(stage: TrainStage) -> CacheSettings:
    """The node-local cache for object-store reads, shared by training and evaluation."""
    return CacheSettings.of(stage.loader.cache.folder, stage.loader.cache.gigabytes)
