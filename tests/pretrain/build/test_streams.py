"""Every data setting of a recipe reaches the data pipeline; an evaluation takes size and text, but no randomness."""

from __future__ import annotations

import pytest

from data_pipeline.batches.spec import SourceSpec, StreamSpec
from data_pipeline.order.batch_schedule import BatchSchedule
from data_pipeline.order.stream_order import stream_seed
from data_pipeline.transforms.captions import CaptionSpec
from data_pipeline.transforms.decode import ImageSpec
from data_pipeline.transforms.text_formats import PackedFormat, TextSpec
from pretrain.build.streams import evaluation_spec, stage_specs, stream_spec
from pretrain.recipe.schema import TrainStage
from pretrain.recipe.sections.data import Stream
from pretrain.recipe.sections.evaluation import Perplexity, ZeroShot

PACKED = {"format": "packed"}
CAPTIONS = {"from": ["txt", "json.all"], "scores": [None, "json.scores"], "top": 2}
WRITTEN = {
    "sources": {
        "a": {"path": "s3://x", "weight": 0.25, "max_epochs": 3, "view": "clean"},
        "b": {"path": "y", "repeat": 2.5, "cap": "1k"},
    },
    "batch": {0: 8, 10: 16},
    "lanes": 4,
    "share_by": "sqrt",
    "image": {
        "size": 48,
        "crop": [0.2, 0.9],
        "flip": True,
        "max_pixels": "2M",
        "mean": [0, 0, 0],
        "std": [1, 1, 1],
    },
    "text": {"tokenizer": "words.json", "length": 17, "captions": CAPTIONS},
}
CHOICE = CaptionSpec(("txt", "json.all"), (None, "json.scores"), 2)


def test_a_stream_has_all_its_settings() -> None:
    found = stream_spec("pairs", Stream.model_validate(WRITTEN), 7, "masked")
    assert found == StreamSpec(
        name="pairs",
        seed=stream_seed(7, "masked", "pairs"),
        sources={
            "a": SourceSpec("s3://x", weight=0.25, max_epochs=3, view="clean"),
            "b": SourceSpec("y", repeat=2.5, cap=1000),
        },
        batch=BatchSchedule.of({0: 8, 10: 16}),
        lanes=4,
        image=ImageSpec(48, (0.2, 0.9), True, 2_000_000),
        text=TextSpec("words.json", 17, CHOICE),
        share_by="sqrt",
    )


def test_packed_text_has_its_length_and_a_stream_may_take_another_stage_s_order() -> None:
    stream = Stream.model_validate(
        {"sources": {"a": "x"}, "text": PACKED | {"length": 9}, "order_as": "masked"}
    )
    found = stream_spec("text", stream, 7, "tuned")
    assert (found.text, found.image, found.lanes) == (PackedFormat(9), None, None)
    assert found.seed == stream_seed(7, "masked", "text") != stream_seed(7, "tuned", "text")


def test_the_objective_says_which_streams_and_in_which_order() -> None:
    data = {name: {"sources": {"a": "x"}, "text": PACKED | {"length": 9}} for name in ("one", "two", "three")}
    stage = TrainStage.model_validate(
        {"data": data, "objective": {"kind": "generative"}, "train": {"steps": 1}}
    )
    assert [spec.name for spec in stage_specs(stage, 7, "main", ("three", "one"))] == ["three", "one"]


@pytest.mark.parametrize("task", [ZeroShot(path="held"), Perplexity(path="held", stream="pairs")])
def test_an_evaluation_sees_the_image_as_training_does_but_without_crop_and_flip(
    task: ZeroShot | Perplexity,
) -> None:
    found = evaluation_spec("held_out", task, Stream.model_validate(WRITTEN), 12)
    assert found.image == ImageSpec(48, (1.0, 1.0), False, 2_000_000)
    assert found.text == TextSpec("words.json", 17, CHOICE)
    assert (found.sources, found.batch, found.lanes) == ({"held_out": SourceSpec("held")}, 12, None)


def test_packed_held_out_text_has_the_length_of_its_task_or_stream() -> None:
    alone = evaluation_spec("held_out", Perplexity(path="held"), None, 12, 9)
    assert (alone.image, alone.text) == (None, PackedFormat(9))
    stream = Stream.model_validate({"sources": {"a": "x"}, "text": PACKED | {"length": 11}})
    task = Perplexity(path="held", stream="text")
    assert evaluation_spec("held_out", task, stream, 12).text == PackedFormat(11)
