"""`continue: X`: a continued training equals an uninterrupted one in order, optimizer and schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.transforms.text_formats import PackedFormat
from data_pipeline.batches.spec import SourceSpec, StreamSpec
from data_pipeline.errors import UserError
from pretrain.recipe.load import load_recipe
from pretrain.recipe.schema import Group, TrainStage
from pretrain.train.resume import check_length, find_start, with_order_of
from tests.support import rank, tiny

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]


def rows(stage: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time"} for row in found]


def test_a_continued_stage_is_the_uninterrupted_one(tmp_path: Path) -> None:
    tiny.make_data(tmp_path)
    stages = {
        "whole": {},
        "rest": {"continue": "whole@4", "train": {"steps": 6}},
        "longer": {"continue": "rest"},
    }
    schedule = {"kind": "constant", "warmup": 3}
    sections = tiny.flip_recipe(
        tmp_path, train={"steps": 8}, schedule=schedule, checkpoint={"every": 2, "keep": 9}, stages=stages
    )
    recipe = tiny.write_recipe(tmp_path / "recipe.yaml", sections)
    folder = tmp_path / "runs" / "flip"
    for stage in stages:
        code, printed = rank.run(recipe, stage=stage)
        assert code == 0, printed

    whole = rows(folder / "whole")
    assert [row["step"] for row in whole] == list(range(1, 9))
    assert rows(folder / "rest") == whole[4:6]
    assert rows(folder / "longer") == whole[6:]  # all three use the order of the first stage

    stage = load_recipe(recipe).stages["rest"]
    assert isinstance(stage, TrainStage)
    start = find_start(stage, folder / "new", 1)
    assert start is not None
    assert start.step == 4
    own = find_start(stage, folder / "rest", 1)
    assert own is not None
    assert own.step == 6  # its own checkpoint has priority
    with pytest.raises(UserError, match="saved with world_size 1, this run has 2"):
        find_start(stage, folder / "new", 2)
    frozen = stage.model_copy(update={"model": stage.model.model_copy(update={"freeze": ["text"]})})
    with pytest.raises(UserError, match=r"with model\.freeze \[\], this stage has \['text'\].*init: whole@4"):
        find_start(frozen, folder / "new", 1)
    engine = stage.engine.model_copy(update={"dtype": "bf16"})
    with pytest.raises(UserError, match=r"with engine\.dtype fp32, this stage has bf16.*init: whole@4"):
        find_start(stage.model_copy(update={"engine": engine}), folder / "new", 1)
    groups = [Group(match="vision", lr_scale=0.5)]
    grouped = stage.optimizer.model_copy(update={"groups": groups})
    with pytest.raises(
        UserError, match=r"optimizer\.groups \[\], this stage has \['vision'\].*init: whole@4"
    ):
        find_start(stage.model_copy(update={"optimizer": grouped}), folder / "new", 1)
    with pytest.raises(UserError, match="is at step 4 already"):
        check_length(start, stage, folder / "new", 4)
    with pytest.raises(UserError, match=r"streams pairs, this stage has captions"):
        with_order_of(
            [StreamSpec("captions", 0, {"x": SourceSpec("x")}, 8, text=PackedFormat(9))],
            start.state["order"],
            "whole@4",
        )
