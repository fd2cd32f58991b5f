"""Weights that cannot be averaged, recognised without any config: adapters, quantisation codes, empty parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import UserError
from pretrain.merge import merge, plan
from pretrain.merge.diff.compare import diff, lines
from pretrain.merge.spec import load_spec, prepare_spec
from pretrain.merge.verify.check_output import verify
from pretrain.weights.source import open_weights
from tests.support.merge_inputs import floats, write

W = {"model.layers.0.q.weight": (4, 4), "model.norm.weight": (4,)}


def refused(tmp_path: Path, held: dict[str, Any], other: dict[str, Any] | None = None) -> str:
    """The message with which a merge of `held` (and `other`) is refused; by flags and by a mergekit file alike."""
    inputs = [str(write(tmp_path / "a", held)), str(write(tmp_path / "b", other or held))]
    with pytest.raises(UserError) as error:
        merge(inputs, tmp_path / "out", beta=0.5)
    spec = tmp_path / "m.yml"
    models = [{"model": path, "parameters": {"weight": 1}} for path in inputs]
    spec.write_text(json.dumps({"merge_method": "linear", "models": models}))
    with pytest.raises(UserError) as mergekit:
        prepare_spec(load_spec(spec))
    assert str(mergekit.value).splitlines()[0] == str(error.value).splitlines()[0]
    assert not (tmp_path / "out").exists()
    return str(error.value)


def module(prefix: str, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {
        f"{prefix}.{name.replace('__', '.')}": floats(i, *shape)
        for i, (name, shape) in enumerate(shapes.items())
    }


Q = "model.layers.0.q"
ADAPTERS = {
    "unmerged": module(
        Q, base_layer__weight=(4, 4), lora_A__default__weight=(2, 4), lora_B__default__weight=(4, 2)
    ),
    "adapter_file": module(f"base_model.{Q}", lora_A__weight=(2, 4), lora_B__weight=(4, 2)),
    "embedding": module("model.embed", lora_embedding_A=(2, 4), lora_embedding_B=(4, 2)),
    "dora": module(Q, weight=(4, 4), lora_magnitude_vector=(4,)),
    "diffusers": module(f"{Q}.lora", up__weight=(4, 2))
    | module(Q, lora_up__weight=(4, 2), lora_down__weight=(2, 4)),
    "kohya": {"lora_te_text_model_q.lora_down.weight": floats(0, 2, 4)},
    "loha": module(Q, hada_w1_a=(4, 2), hada_w1_b=(2, 4)),
    "ia3": module(Q, ia3_l=(4, 1)),
    "saved_modules": module("score", modules_to_save__default__weight=(4, 4), original_module__weight=(4, 4)),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_by_their_tensors(tmp_path: Path, kind: str) -> None:
    message = refused(tmp_path, ADAPTERS[kind])
    assert "merge_and_unload" in message
    assert str(tmp_path / "a") in message
    noted = lines(diff(str(tmp_path / "a"), str(tmp_path / "b")), 2, 2)
    assert any("merge_and_unload" in line for line in noted)


def test_one_adapter_beside_one_model(tmp_path: Path) -> None:
    message = refused(tmp_path, {n: floats(0, *s) for n, s in W.items()}, ADAPTERS["dora"])
    assert str(tmp_path / "b") in message
    assert "merge_and_unload" in message


def codes(dtype: str, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, shape).astype(dtype)


QUANTISED = {
    "gptq": {
        f"{Q}.qweight": codes("i4", 2, 4),
        f"{Q}.qzeros": codes("i4", 1, 2),
        f"{Q}.scales": floats(0, 1, 4),
    },
    "awq": {f"{Q}.qweight": codes("i4", 4, 2), f"{Q}.scales": floats(0, 1, 4)},
    "bnb4": {f"{Q}.weight": codes("u1", 8, 1), f"{Q}.weight.absmax": floats(0, 2)},
    "bnb8": {f"{Q}.weight": codes("i1", 4, 4), f"{Q}.SCB": floats(0, 4)},
    "packed": {f"{Q}.weight_packed": codes("i4", 4, 1), f"{Q}.weight_scale": floats(0, 4, 1)},
    "aqlm": {f"{Q}.codes": codes("i1", 4, 4, 1), f"{Q}.codebooks": floats(0, 1, 4)},
    "hqq": {f"{Q}.W_q": codes("u1", 2, 4), f"{Q}.scale": floats(0, 4)},
    "mxfp4": {"model.experts.gate_blocks": codes("u1", 2, 4), "model.experts.gate_scales": codes("u1", 2)},
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_codes_by_their_tensors(tmp_path: Path, kind: str) -> None:
    message = refused(tmp_path, QUANTISED[kind] | {"model.norm.weight": floats(3, 4)})
    assert "quantised" in message
    assert "before quantisation" in message
    assert "--exclude" not in message
    assert "convert" not in message
    noted = lines(diff(str(tmp_path / "a"), str(tmp_path / "b")), 2, 2)
    assert any("quantised" in line for line in noted)


def test_integers_that_are_no_codes_are_copied(tmp_path: Path) -> None:
    held = {
        "w.weight": floats(0, 4, 4),
        "bn.num_batches_tracked": np.array(3),
        "attn.relative_position_index": codes("i4", 4, 4),
        "tokens.position_ids": codes("i8", 1, 4),
        "attn.mask": np.ones((2, 2), bool),
        "w.weight_mask": codes("u1", 4, 4),
    }
    inputs = [str(write(tmp_path / n, held)) for n in "ab"]
    assert merge(inputs, tmp_path / "out", beta=0.5)["mixed"] == 1


EMPTY = np.zeros(0, np.float32)
EMPTIES = {
    "all": dict.fromkeys(W, EMPTY),
    "small_ones_kept": {"model.layers.0.q.weight": EMPTY, "model.norm.weight": floats(0, 4)},
    "bare_parameters": {"cls_token": EMPTY, "pos_embed": EMPTY},
    "half": {"embed.weight": EMPTY.astype(np.float16), "embed.bias": floats(0, 4).astype(np.float16)},
}


@pytest.mark.parametrize("kind", EMPTIES)
def test_empty_parameters(tmp_path: Path, kind: str) -> None:
    message = refused(tmp_path, EMPTIES[kind])
    assert "ZeRO-3" in message
    assert "shape [0]" in message
    with pytest.raises(UserError, match="ZeRO-3"):
        diff(str(tmp_path / "a"), str(tmp_path / "b"))


def test_verify_finds_an_empty_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that an earlier version wrote."""
    inputs = [str(write(tmp_path / n, EMPTIES["small_ones_kept"])) for n in "ab"]
    monkeypatch.setattr("pretrain.weights.source.refuse_empty", lambda *_: None)
    merge(inputs, tmp_path / "out", beta=0.5)
    report = verify(tmp_path / "out")
    assert any("ZeRO-3" in f.text for f in report.findings if f.level == "wrong")


def test_an_empty_buffer_is_no_empty_model(tmp_path: Path) -> None:
    held = {"w.weight": floats(0, 3), "cache": EMPTY, "none.weight": np.zeros((0, 4), np.float32)}
    inputs = [str(write(tmp_path / n, held)) for n in "ab"]
    merge(inputs, tmp_path / "out", beta=0.5)
    assert not verify(tmp_path / "out").wrong
    assert open_weights(inputs[0]).info("cache") == ("F32", (0,))


@pytest.mark.parametrize("dtype", ["complex64", "float8_e8m0fnu", "float8_e4m3fn", "float8_e5m2fnuz"])
def test_dtypes_that_are_not_mixed(tmp_path: Path, dtype: str) -> None:
    """Complex buffers are copied and said; 8-bit floats are refused without advice that mixes their scales."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    raw = torch.arange(16, dtype=torch.uint8)
    inputs = [str(tmp_path / name) for name in "ab"]
    for i, folder in enumerate(inputs):
        Path(folder).mkdir()
        held = {"rope.freqs": (raw + i).view(getattr(torch, dtype)), "w": torch.full((2,), float(i))}
        save_file(held, f"{folder}/model.safetensors", {"format": "pt"})
    if dtype != "complex64":
        with pytest.raises(UserError) as error:
            merge(inputs, tmp_path / "out", beta=0.5)
        assert "--exclude" not in str(error.value)
        assert "16 bits" in str(error.value) or "before quantisation" in str(error.value)
        return
    assert any("rope.freqs: C64" in note for note in plan(inputs, beta=0.5).notes)
    merge(inputs, tmp_path / "out", beta=0.5)
    out = open_weights(str(tmp_path / "out"))
    assert out.read("rope.freqs", 0, 2).tobytes() == bytes(range(16))
    assert out.array("w").tolist() == [0.5, 0.5]
    assert not verify(tmp_path / "out", full=True).wrong
    assert diff(*inputs).opaque == {"rope.freqs": False}
