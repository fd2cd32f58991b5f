"""Rows of a stream against the reference: order, crop, mirror, caption, tokens and replacements, bit for bit.

The reference (tests/support/reference) reads the tars with tarfile, decodes with Pillow, and draws in plain integers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipeline import PackedFormat, TextFormat, TextSpec
from data_pipeline.batches.spec import SourceSpec
from data_pipeline.stream import Stream
from data_pipeline.transforms.captions import CaptionSpec
from data_pipeline.transforms.decode import ImageSpec
from tests.support import reference_recipes as recipes
from tests.support.reference import draws
from tests.support.reference.rows import Row, stream_rows
from tests.support.reference_batches import check_batch

STEPS, SEED = 8, 11


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    recipes.make_data(folder)
    return folder


def opened(settings: dict[str, Any], rank: int, world_size: int) -> Stream:
    """`Stream` with the settings of `data.STREAM` of a recipe."""
    image, text = settings.get("image"), settings.get("text")
    captions = CaptionSpec(tuple(text["captions"]["from"])) if text and "captions" in text else None
    return Stream(
        {
            key: SourceSpec(**({"path": value} if isinstance(value, str) else value))
            for key, value in settings["sources"].items()
        },
        settings["batch"],
        image=ImageSpec(image["size"], tuple(image["crop"]), image["flip"]) if image else None,
        text=text_format(text, captions) if text else None,
        seed=SEED,
        name="rows",
        lanes=settings.get("lanes"),
        share_by=settings.get("share_by", "size"),
        rank=rank,
        world_size=world_size,
    )


def text_format(text: dict[str, Any], captions: CaptionSpec | None) -> TextFormat:
    if text.get("format") == "packed":
        return PackedFormat(text["length"])
    return TextSpec(text["tokenizer"], text["length"], captions)


def reference(settings: dict[str, Any]) -> list[list[Row]]:
    return list(stream_rows(settings, "rows", draws.stream_seed(SEED, "stream", "rows"), STEPS))


def streams(root: Path) -> dict[str, dict[str, Any]]:
    """A mixture with a ramp-up, several captions a sample, extreme crops, no crop, packed text."""
    mixture = recipes.pairs_stream(root)
    captions = mixture["text"] | {"captions": {"from": ["json.others", "txt"]}}
    one = mixture | {"sources": {"pairs": str(root / "pairs")}, "batch": 10, "lanes": 2}
    return {
        "mixture": mixture,
        "captions": mixture | {"text": captions, "batch": 6, "lanes": 3},
        "small crops": one | {"image": {"size": 20, "crop": [0.01, 0.1], "flip": True}},
        "no candidate fits": one | {"image": {"size": 12, "crop": [1.0, 1.0 - 1e-9][::-1], "flip": True}},
        "whole": one | {"image": {"size": 16, "crop": [1.0, 1.0], "flip": True}},
        "text": recipes.sphinx(root, "", "")["data"]["text"],
    }


NAMES = ("mixture", "captions", "small crops", "no candidate fits", "whole", "text")


@pytest.mark.parametrize("name", NAMES)
def test_batches_on_one_to_five_ranks(root: Path, name: str) -> None:
    settings = streams(root)[name]
    rows = reference(settings)
    assert len({row.key for step in rows for row in step}) > STEPS or name == "text"
    for world_size in (1, 2, 3, 5):
        for rank in range(world_size):
            with opened(settings, rank, world_size) as stream:
                for of_step in rows:
                    start, stop = (len(of_step) * each // world_size for each in (rank, rank + 1))
                    check_batch(next(stream), of_step[start:stop])


def test_the_streams_exercise_what_they_are_for(root: Path) -> None:
    found = {
        name: [row for step in reference(settings) for row in step]
        for name, settings in streams(root).items()
    }
    assert {row.caption for row in found["captions"]} >= {0, 2, 3}  # number 1 is blank
    assert len({row.crop for row in found["small crops"]}) > 40
    assert {reason for row in found["mixture"] for _, reason in row.attempts} == {
        "undecodable", "missing image", "missing caption",
    }  # fmt: skip
    mirrored = [row.crop[-1] for row in found["whole"]]
    assert 0.3 < sum(mirrored) / len(mirrored) < 0.7
