"""From a recipe's `data` section to the stream specifications that the data pipeline serves."""

from __future__ import annotations

from data_pipeline.batches.spec import SourceSpec, StreamSpec, TextSpec
from data_pipeline.order.stream_order import stream_seed
from data_pipeline.storage.cache import CacheSettings
from data_pipeline.transforms.captions import CaptionSpec
from data_pipeline.transforms.decode import ImageSpec
from pretrain.recipe.data import Image, Stream, Text
from pretrain.recipe.schema import Perplexity, TrainStage, ZeroShot


def stream_spec(name: str, stream: Stream, run_seed: int, stage: str) -> StreamSpec:
    """One stream of a stage; `order_as` lends it another stage's order, crops and masks."""
    return StreamSpec(
        name=name,
        seed=stream_seed(run_seed, stream.order_as or stage, name),
        sources={key: SourceSpec(**source.model_dump()) for key, source in stream.sources.items()},
        batch=stream.batches,
        lanes=stream.lanes,
        image=image_spec(stream.image) if stream.image else None,
        text=text_spec(stream.text) if stream.text else None,
        length=stream.length,
        share_by=stream.share_by,
    )


def image_spec(image: Image) -> ImageSpec:
    """What workers do to an image; mean and deviation are applied on the device."""
    return ImageSpec(image.size, image.crop, image.flip, image.max_pixels)


def text_spec(text: Text) -> TextSpec:
    """How workers choose a caption and make it tokens."""
    chosen = text.captions
    captions = CaptionSpec(tuple(chosen.from_), tuple(chosen.scores), chosen.top) if chosen else None
    return TextSpec(text.tokenizer, text.length, captions)


def stage_specs(stage: TrainStage, run_seed: int, name: str, streams: tuple[str, ...]) -> list[StreamSpec]:
    """Specifications of the streams that the objective consumes, in its order."""
    return [stream_spec(key, stage.data[key], run_seed, name) for key in streams]


def evaluation_spec(
    name: str, wanted: Perplexity | ZeroShot, stream: Stream | None, batch: int
) -> StreamSpec:
    """One held-out source read once in manifest order, with a training stream's image and text settings."""
    image = stream.image if stream is not None else None
    text = stream.text if stream is not None else None
    return StreamSpec(
        name=name,
        seed=0,
        sources={name: SourceSpec(path=wanted.path)},
        batch=batch,
        lanes=None,
        image=ImageSpec(image.size, max_pixels=image.max_pixels) if image else None,
        text=text_spec(text) if text else None,
        length=getattr(wanted, "length", None) if stream is None else stream.length,
    )


def cache_settings(stage: TrainStage) -> CacheSettings:
    """Where a stage keeps what it reads of object stores, for training and evaluation alike."""
    return CacheSettings.of(stage.loader.cache.folder, stage.loader.cache.gigabytes)
