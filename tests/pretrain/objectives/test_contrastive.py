"""The contrastive loss against brute force: masks by each row's key, all negatives, a mean over the global batch."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.hashing import hash64
from pretrain.models.clip import Clip
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.device_batch import DeviceBatch
from pretrain.recipe.schema import TrainStage
from tests.support import plain_clip
from tests.support.rows import batch, device_batch, part_of, with_images
from tests.support.tiny_models import ROWS, Words, clip, pictures, sentences

KEYS = np.array([11, 2**63 + 5, 7, 12, 2**64 - 1], np.uint64)
USED = [3, 4, 5, 6, 7]


def stage(mask: float) -> TrainStage:
    return TrainStage.model_validate(
        {
            "data": {"pairs": {"sources": {"a": "x"}, "image": {}, "text": {}}},
            "objective": {"kind": "contrastive", "image_mask": mask},
            "train": {"steps": 1},
        }
    )


def rows(keys: np.ndarray = KEYS, ids: list[int] | None = None) -> DeviceBatch:
    return device_batch(
        sentences(), USED, pictures(), keys=torch.from_numpy(keys.view(np.int64)),
        sample_ids=torch.tensor(ids or list(range(ROWS))),
    )  # fmt: skip


def kept(key: Any, ratio: float) -> list[int]:
    """The patches with the smallest hash of (key, 3, patch), in order."""
    noise = hash64(key, 3, np.arange(16)).view(np.int64)
    return sorted(np.argsort(noise, kind="stable")[: int(16 * (1 - ratio))].tolist())


def expected_loss(model: Clip, ratio: float, ids: list[int], count: float) -> float:
    state: dict[str, Tensor] = model.state_dict()
    places = [kept(key, ratio) for key in KEYS]
    image = plain_clip.image_features(state, pictures(), 2, "tok", places)
    text = plain_clip.text_features(state, sentences(), 3, Words.end_id, causal=True)
    logits = image @ text.T / 0.07
    same = torch.tensor(ids)[:, None] == torch.tensor(ids)[None, :]
    logits = logits.masked_fill(same & ~torch.eye(ROWS, dtype=torch.bool), -math.inf)
    sums = [(x.logsumexp(1) - x.diagonal()).sum() for x in (logits, logits.T)]
    return float(sum(sums)) / 2 / count


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [0, 1, 0, 3, 1]])
def test_the_loss_is_that_of_the_kept_patches(ratio: float, ids: list[int]) -> None:
    model = clip({})
    objective = Contrastive(model, stage(ratio))
    for count in (5.0, 20.0):
        loss = objective.loss(model, "pairs", rows(ids=ids), count)
        expected = expected_loss(model, ratio, ids, count)
        assert loss.total.item() == pytest.approx(expected, rel=1e-5)
        assert {name: float(value) for name, value in loss.parts.items()} == {"loss/pairs": loss.total.item()}
        assert not loss.parts["loss/pairs"].requires_grad
    assert (objective.main, objective.streams) == ("pairs", ("pairs",))


class Autograd:
    """Forward and backward as the engine has them, without an engine."""

    def __init__(self, model: Clip) -> None:
        self.model, self.forwards = model, 0

    def __call__(self, **inputs: Tensor) -> Any:
        self.forwards += 1
        return self.model(**inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


@pytest.mark.parametrize("cuts", [(0, 5), (0, 2, 5), (0, 1, 4, 5), (0, 1, 2, 3, 4, 5)])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [0, 1, 0, 3, 1]])
def test_cached_features_give_the_gradients_of_the_whole_batch(cuts: tuple[int, ...], ids: list[int]) -> None:
    """Of all parameters, the temperature included; in float64, so that only a wrong formula differs."""
    whole, parted = clip({}).double(), clip({}).double()
    everything = with_images(rows(ids=ids), pictures().double())
    expected = Contrastive(whole, stage(0.5)).loss(whole, "pairs", everything, 20.0).total
    expected.backward()
    engine = Autograd(parted)
    parts = [part_of(everything, start, stop) for start, stop in pairwise(cuts)]
    found = Contrastive(parted, stage(0.5)).backward(engine, "pairs", parts, 20.0)
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-6)  # its log-sum-exp is in fp32
    assert found == {"loss": found["loss"], "loss/pairs": found["loss"]}
    assert engine.forwards == (1 if len(parts) == 1 else 2 * len(parts))
    scales = []
    for (name, ours), theirs in zip(parted.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8, msg=name)
        scales.append(float(theirs.grad.abs().max()))  # type: ignore[union-attr]
    assert min(scales) > 1e-6  # no comparison of zeros


@pytest.mark.parametrize("cuts", [(0, 5), (0, 2, 5)])
def test_the_temperature_can_train_alone(cuts: tuple[int, ...]) -> None:
    """Only the first micro-batch carries its gradient; the others have none."""
    model = clip({}).double().requires_grad_(False)
    model.logit_scale.requires_grad_()
    everything = with_images(rows(), pictures().double())
    parts = [part_of(everything, start, stop) for start, stop in pairwise(cuts)]
    Contrastive(model, stage(0.5)).backward(Autograd(model), "pairs", parts, 5.0)
    step = 1e-3
    losses = []
    for change in (step, -step):
        with torch.no_grad():
            model.logit_scale += change
            losses.append(Contrastive(model, stage(0.5)).loss(model, "pairs", everything, 5.0).total.item())
            model.logit_scale -= change
    assert model.logit_scale.grad is not None
    assert model.logit_scale.grad.item() == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-2)


def test_the_tower_receives_the_patches_of_each_row_s_own_key() -> None:
    model = clip({})
    seen: list[list[list[int]]] = []

    def forward(keep: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        seen.append(keep.tolist())
        return model(keep=keep, **inputs)

    objective = Contrastive(model, stage(0.5))
    for keys in (KEYS, KEYS[::-1].copy(), KEYS + np.uint64(1)):
        objective.loss(forward, "pairs", rows(keys), 5.0)
        assert seen[-1] == [kept(key, 0.5) for key in keys]
    assert (
        len({str(row) for step in (seen[0], seen[2]) for row in step}) == 2 * ROWS - 1
    )  # 11 and 12 are in both


def test_rows_are_counted_whatever_their_weight() -> None:
    objective = Contrastive(clip({}), stage(0))
    assert objective.loss_denominator("pairs", batch(np.ones((3, 4)), start=9)) == 3


def test_the_floor_counts_captions_over_all_micro_batches() -> None:
    """Two captions are the same if all their tokens are, the last one included."""
    tokens = np.array([[1, 5, 2, 0], [1, 5, 2, 9], [1, 5, 2, 0], [1, 6, 2, 0], [1, 5, 2, 0], [1, 6, 2, 0]])
    objective = Contrastive(clip({}), stage(0))
    counts = Counter(map(tuple, tokens.tolist()))
    expected = sum(math.log(counts[tuple(row)]) for row in tokens.tolist()) / 6
    for cuts in ((0, 6), (0, 2, 6), (0, 1, 2, 3, 4, 5, 6)):
        parts = [batch(tokens[a:b]) for a, b in pairwise(cuts)]
        found = objective.metrics({"pairs": parts}, torch.device("cpu"))
        assert found == {"loss_floor": pytest.approx(expected, rel=1e-12)}


def test_only_what_is_not_trained_is_frozen() -> None:
    assert Contrastive(clip({}), stage(0)).frozen() == {}
    model = clip({"positions": "sincos"})
    model.visual.conv1.weight.requires_grad_(False)
    found = Contrastive(model, stage(0)).frozen()
    assert set(found) == {"visual.positional_embedding", "visual.conv1.weight"}
    assert torch.equal(found["visual.conv1.weight"], model.visual.conv1.weight)
