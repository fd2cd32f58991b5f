"""SPHINX's loss: a mean per token of each stream, weighted per stream, for any split into micro-batches."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.models.encoders.open_clip_vit import OpenClipVit
from pretrain.objectives.device_batch import DeviceBatch
from pretrain.objectives.generative import Generative
from pretrain.recipe.schema import TrainStage
from tests.support.rows import batch, device_batch, part_of
from tests.support.tiny_models import ROWS, clip, multimodal, pictures, sentences

USED = [3, 4, 5, 6, 7]
TARGETS = sum(USED) - ROWS


def stage(weights: dict[str, float] | None = None, **streams: Any) -> TrainStage:
    source = {"sources": {"a": "x"}}
    data = {
        "captions": source | {"image": {}, "text": {}},
        "text": source | {"text": {"format": "packed", "length": 7}},
        "code": source | {"text": {"format": "packed", "length": 7}},
    }
    return TrainStage.model_validate(
        {"data": data, "objective": {"kind": "generative", "weights": weights}, "train": {"steps": 1}}
    )


def objective(weights: dict[str, float] | None = None) -> Generative:
    return Generative(multimodal(OpenClipVit(clip({}).visual.requires_grad_(False))), stage(weights))


def rows(images: bool, weights: list[float] | None = None) -> DeviceBatch:
    given = {"weights": torch.tensor(weights)} if weights else {}
    return device_batch(sentences(), USED, pictures() if images else None, **given)


def row_nll(made: Generative, images: bool) -> list[float]:
    """Each row alone, through the model itself (tests/pretrain/models/test_multimodal.py), with no objective."""
    out = []
    for row in range(ROWS):
        shown = pictures()[row : row + 1] if images else None
        tokens, used = sentences()[row : row + 1], torch.tensor(USED[row : row + 1])
        with torch.no_grad():
            out.append(float(made.model(tokens=tokens, used=used, images=shown)))
    return out


def test_text_comes_first_and_images_measure_the_training() -> None:
    made = objective()
    assert made.streams == ("text", "code", "captions")
    assert made.main == "captions"


@pytest.mark.parametrize("weights", [None, {"text": 0.25}, {"captions": 3.0, "text": 0.0}])
@pytest.mark.parametrize("stream", ["captions", "text"])
def test_a_stream_s_loss_is_its_weight_times_its_mean_per_token(
    weights: dict[str, float] | None, stream: str
) -> None:
    made = objective(weights)
    loss = made.loss(made.model, stream, rows(stream == "captions"), float(TARGETS))
    mean = sum(row_nll(made, stream == "captions")) / TARGETS
    assert loss.total.item() == pytest.approx((weights or {}).get(stream, 1.0) * mean, rel=1e-5)
    assert {name: value.item() for name, value in loss.parts.items()} == {
        f"loss/{stream}": pytest.approx(mean, rel=1e-5)  # without the weight, to compare streams and runs
    }
    assert not loss.parts[f"loss/{stream}"].requires_grad


@pytest.mark.parametrize("cuts", [(0, 5), (0, 2, 5), (0, 1, 2, 3, 4, 5)])
def test_micro_batches_add_up_in_loss_and_gradient(cuts: tuple[int, ...]) -> None:
    made, whole = objective({"captions": 2.0}), objective({"captions": 2.0})
    expected = whole.loss(whole.model, "captions", rows(True), TARGETS).total
    expected.backward()
    found = 0.0
    for start, stop in pairwise(cuts):
        part = made.loss(made.model, "captions", part_of(rows(True), start, stop), TARGETS)
        part.total.backward()
        found += part.total.item()
    assert found == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(made.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_rows_without_weight_count_in_neither_sum_nor_denominator() -> None:
    made = objective()
    weights = [1.0, 0.0, 1.0, 1.0, 0.0]
    counted = made.loss_denominator("captions", batch(sentences().numpy(), USED, weights=np.float32(weights)))
    assert counted == 2 + 4 + 5
    found = made.loss(made.model, "captions", rows(True, weights), counted).total.item()
    each = row_nll(made, True)
    assert found == pytest.approx((each[0] + each[2] + each[3]) / counted, rel=1e-5)


def test_the_frozen_tower_and_frozen_parts_are_saved_under_their_names() -> None:
    made = objective()
    made.model.llm.lm_head.weight.requires_grad_(False)
    tower = {f"vision.0.{name}": value for name, value in made.model.vision[0].state_dict().items()}
    expected = tower | {"llm.lm_head.weight": made.model.llm.lm_head.weight}
    found = made.frozen()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_stage_of_text_alone_needs_no_tower() -> None:
    made = Generative(multimodal(None), stage())
    found = made.loss(made.model, "text", rows(False), TARGETS).total.item()
    assert found == pytest.approx(sum(row_nll(made, False)) / TARGETS, rel=1e-5)
    assert [made.visual_tokens(stream) for stream in made.streams] == [0, 0, 0]


def test_images_take_the_place_of_their_tokens_and_two_delimiters() -> None:
    made = objective()
    assert {stream: made.visual_tokens(stream) for stream in made.streams} == {
        "captions": 1 + 16 + 2,
        "text": 0,
        "code": 0,
    }
    assert made.max_length == 64
