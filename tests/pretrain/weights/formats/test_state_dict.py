"""Torch files with several state dicts: never part of a model in silence; `key` chooses one of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from data_pipeline.errors import UserError
from pretrain.merge import merge
from pretrain.merge.verify.check_output import verify
from pretrain.weights.source import open_weights
from tests.support.merge_inputs import floats, write

torch = pytest.importorskip("torch")


def net(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    return dict(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).state_dict())


SEVERAL: dict[str, Callable[[int], Any]] = {
    "net_and_loss": lambda s: {"epoch": 5, "net": net(s), "loss": torch.tensor(0.5)},
    "parts_and_scale": lambda s: {
        "model": {"encoder": net(s), "decoder": net(s + 9), "logit_scale": torch.tensor(2.0)}, "step": 1,
    },
    "model_and_ema": lambda s: {"model": net(s), "model_ema": net(s + 9), "optimizer": {}},
    "timm": lambda s: {"state_dict": net(s), "state_dict_ema": net(s + 9), "metric": 0.7},
    "beside_weights": lambda s: {**net(s), "head": net(s + 9)},
    "in_a_list": lambda s: {"state_dict": net(s), "towers": [net(s + 9)]},
}  # fmt: skip


@pytest.mark.parametrize("name", SEVERAL)
def test_several_state_dicts_are_refused_and_named(tmp_path: Path, name: str) -> None:
    for i in range(2):
        torch.save(SEVERAL[name](i), tmp_path / f"{i}.pt")
    with pytest.raises(UserError, match=r"--key") as error:
        merge([str(tmp_path / "0.pt"), str(tmp_path / "1.pt")], tmp_path / "out", beta=0.5)
    assert not (tmp_path / "out").exists()
    message = str(error.value)
    assert "0.pt: " in message
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize(
    ("name", "key", "shift"),
    [
        ("net_and_loss", "net", 0),
        ("parts_and_scale", "model.encoder", 0),
        ("parts_and_scale", "model.decoder", 9),
        ("model_and_ema", "model_ema", 9),
        ("model_and_ema", "model", 0),
        ("timm", "state_dict_ema", 9),
        ("in_a_list", "towers.0", 9),
    ],
)
def test_a_key_chooses_one_of_them(tmp_path: Path, name: str, key: str, shift: int) -> None:
    for i in range(2):
        torch.save(SEVERAL[name](i), tmp_path / f"{i}.pt")
    inputs = [str(tmp_path / "0.pt"), str(tmp_path / "1.pt")]
    merge(inputs, tmp_path / "out", beta=0.5, key=key)
    merged = load_file(tmp_path / "out/model.safetensors")
    a, b = net(shift), net(1 + shift)
    assert set(merged) == set(a)
    for tensor, value in merged.items():
        mean = (a[tensor].double() + b[tensor].double()) / 2
        np.testing.assert_array_equal(value, mean.float().numpy())
    report = verify(tmp_path / "out")
    assert not report.wrong
    assert report.recomputed


def test_another_key_is_another_merge(tmp_path: Path) -> None:
    for i in range(2):
        torch.save(SEVERAL["model_and_ema"](i), tmp_path / f"{i}.pt")
    inputs = [str(tmp_path / "0.pt"), str(tmp_path / "1.pt")]
    merge(inputs, tmp_path / "out", beta=0.5, key="model")
    with pytest.raises(UserError, match="has another merge"):
        merge(inputs, tmp_path / "out", beta=0.5, key="model_ema")


def test_a_key_that_does_not_exist(tmp_path: Path) -> None:
    torch.save(SEVERAL["model_and_ema"](0), tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"has no state dict 'ema'; it has model .*, model_ema"):
        open_weights(str(tmp_path / "x.pt"), key="ema")


def test_a_key_without_a_torch_file(tmp_path: Path) -> None:
    inputs = [str(write(tmp_path / n, {"w": floats(0, 3)})) for n in "ab"]
    with pytest.raises(UserError, match="--key model_ema"):
        merge(inputs, tmp_path / "out", beta=0.5, key="model_ema")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}},
        lambda s: {"state_dict": s, "best_acc": torch.tensor(0.7), "metrics": {"acc": torch.tensor(0.7)}},
        lambda s: {"state_dict": s, "callbacks": {"ckpt": {"scores": torch.ones(3)}}, "loops": {}},
        lambda s: {
            "model": s,
            "optimizer_states": {"w": {"exp_avg": torch.ones(3)}},
            "rng": {"cpu": torch.ones(3)},
        },
    ],
    ids=["optimizer", "metrics", "lightning", "by_name"],
)
def test_what_a_training_keeps_beside_its_weights_is_no_second_model(tmp_path: Path, wrap: Any) -> None:
    torch.save(wrap(net(0)), tmp_path / "x.pt")
    assert sorted(open_weights(str(tmp_path / "x.pt")).names()) == sorted(net(0))
