"""What a stage lacks is said by key; what a stage folder lacks, by file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from data_pipeline.errors import UserError
from pretrain.build.encoders import build_encoder, check_preprocessing
from pretrain.build.module_weights import (
    has_whole,
    load_whole,
    read_description,
    read_frozen,
    write_frozen,
)
from pretrain.build.objective import build
from pretrain.build.saved_stage import read_stage
from pretrain.build.tokenizer import optional_tokenizer, stage_tokenizer, tokenizer_name
from pretrain.models.connectors import build_connector
from pretrain.models.encoders.base import Preprocessing
from pretrain.models.language_models import build_language_model
from pretrain.recipe import SCHEMA
from pretrain.recipe.schema import TrainStage
from pretrain.recipe.sections.data import Image
from pretrain.recipe.sections.model import LinearConnector, Llm, Vision
from tests.support.samples import write_tokenizer
from tests.support.tiny_models import LLAMA, Tokens, Words

PACKED = {"sources": {"a": "x"}, "text": {"format": "packed", "length": 8}}


def stage(**sections: Any) -> TrainStage:
    given = {"data": {"text": PACKED}, "objective": {"kind": "generative"}, "train": {"steps": 1}}
    return TrainStage.model_validate(given | sections)


def test_the_tokenizer_is_that_of_the_language_model_else_of_the_main_stream(tmp_path: Path) -> None:
    folder = str(write_tokenizer(tmp_path / "words"))
    captions = {"sources": {"a": "x"}, "image": {}, "text": {"tokenizer": folder}}
    both = stage(data={"text": PACKED, "captions": captions})
    assert tokenizer_name(both) == folder
    assert stage_tokenizer(both).vocab_size == 20
    of_model = stage(data=both.data, model={"llm": {"config": LLAMA, "tokenizer": "elsewhere"}})
    assert tokenizer_name(of_model) == "elsewhere"


@pytest.mark.parametrize("data", [{"text": PACKED}, {"images": {"sources": {"a": "x"}, "image": {}}}])
def test_a_stage_without_a_tokenizer_is_refused_where_one_is_needed(data: dict[str, Any]) -> None:
    given = stage(data=data, model={"llm": {"config": LLAMA}})
    assert optional_tokenizer(given) is None
    for needs in (tokenizer_name, stage_tokenizer, lambda each: build(each, "main", 0, None)):
        with pytest.raises(
            UserError, match=r"model\.llm\.tokenizer is missing, and no stream of the stage has"
        ):
            needs(given)


@pytest.mark.parametrize(
    ("llm", "written"), [(None, "none"), (Llm(), "none"), (Llm(init="hf://a/b"), "none")]
)
def test_a_language_model_comes_from_somewhere(llm: Llm | None, written: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.llm: .*needs exactly one of config; here: {written}$"):
        build_language_model(llm, Words())


def test_a_connector_is_never_guessed() -> None:
    with pytest.raises(
        UserError, match=r"^model\.connector is missing; write connector: \{kind: linear, norm"
    ):
        build_connector(None, 3, 4)
    made = build_connector(LinearConnector(norm=True), 3, 4)
    assert {name: tuple(p.shape) for name, p in made.named_parameters()} == {
        "linear.weight": (4, 3), "linear.bias": (4,), "norm.weight": (4,), "norm.bias": (4,),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"stage": {}}, "it has no 'name'"),
        (
            {"name": "main", "stage": {"train": {"steps": 1}}},
            "objective: Field required; a run of an earlier version cannot be read",
        ),
        (
            {"name": "main", "stage": {"objective": {"kind": "soup"}, "train": {"steps": 1}}},
            "'soup' is none of",
        ),
    ],
)
def test_a_record_that_is_no_stage_is_named(tmp_path: Path, record: dict[str, Any], words: str) -> None:
    (tmp_path / "resolved.yaml").write_text(yaml.safe_dump({"schema": SCHEMA} | record))
    with pytest.raises(UserError, match="is not a valid stage record") as found:
        read_stage(tmp_path)
    message = str(found.value)
    assert message.startswith(f"{tmp_path / 'resolved.yaml'} is not a valid stage record: ")
    assert words in message
    assert "\n" not in message


def test_a_folder_without_a_record_has_an_unknown_model(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"^{tmp_path}: its model is unknown: resolved\.yaml is missing there"
    ):
        read_stage(tmp_path)


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ({"size": 32}, None),
        ({"size": 48}, "size is 48, .* was trained with 32"),
        ({"size": 32, "mean": [0.5, 0.5, 0.5]}, r"mean is \(0\.5, 0\.5, 0\.5\)"),
        ({"size": 32, "std": [0.5, 0.5, 0.5]}, r"std is \(0\.5, 0\.5, 0\.5\)"),
    ],
)
def test_an_encoder_gets_the_images_that_it_knows(written: dict[str, Any], key: str | None) -> None:
    default = Image(size=32)
    encoder = Tokens(3)
    data = stage(
        data={"text": PACKED, "captions": {"sources": {"a": "x"}, "image": written, "text": {}}}
    ).data
    check_preprocessing(encoder, data)  # it takes any
    encoder.preprocessing = Preprocessing(32, default.mean, default.std)
    if key is None:
        check_preprocessing(encoder, data)
        return
    line = re.escape(f"write image: {{size: 32, mean: {list(default.mean)}, std: {list(default.std)}}}")
    with pytest.raises(UserError, match=rf"^data\.captions\.image\.{key}.*{line}$"):
        check_preprocessing(encoder, data)


def test_whole_weights_are_whole() -> None:
    linear = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    state = {name: tensor + 1 for name, tensor in linear.state_dict().items()}
    load_whole(linear, state | {"more.weight": torch.ones(1)}, "x")
    assert torch.equal(linear.state_dict()["1.weight"], state["1.weight"])
    part = {name: tensor for name, tensor in state.items() if not name.startswith("1.")}
    with pytest.raises(
        UserError, match=r"^x: has no weights for 1\.\* \(2 tensors\); name weights of the whole"
    ):
        load_whole(linear, part, "x")
    assert has_whole(state | {"more": torch.ones(1)}, {"0.weight": torch.ones(2, 2)})
    assert not has_whole(state, {"0.weight": torch.ones(2, 3)})
    assert not has_whole(part, {"0.weight": torch.ones(2, 2), "1.weight": torch.ones(2)})
    assert not has_whole(state, {})


@pytest.mark.parametrize(
    ("tower", "words"),
    [
        ({"width": 8}, "model.vision: write init"),
        ({"arch": "toy://x"}, "model.vision.arch: toy://x: no encoder can be built from this architecture"),
        ({"init": "hf://a/b"}, "model.vision.init: hf://a/b: no encoder can be built from a hf address"),
    ],
)
def test_an_encoder_comes_from_somewhere(tower: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as found:
        build_encoder(Vision.model_validate(tower), None, None)
    assert words in str(found.value)


@pytest.mark.parametrize("read", [read_frozen, read_description])
@pytest.mark.parametrize("damage", ["cut", "empty", "header", "description"])
def test_damaged_frozen_tensors_are_named(
    tmp_path: Path, read: Callable[[Path], object], damage: str
) -> None:
    path = tmp_path / "frozen.safetensors"
    write_frozen(path, {"a": torch.ones(9)}, {"kind": "stage"})
    assert read(path)
    if damage == "description":
        save_file({"a": torch.ones(9)}, path, metadata={"towers": "{"})
        if read is read_frozen:
            assert set(read_frozen(path)) == {"a"}  # it does not read the description
            return
    else:
        whole = path.read_bytes()
        path.write_bytes({"cut": whole[:-9], "empty": b"", "header": b"\xff" * 8 + whole[8:]}[damage])
    with pytest.raises(
        UserError, match=rf"^{path} is damaged: .*; restore it, or delete {tmp_path} and train"
    ):
        read(path)


def test_an_encoder_of_a_kind_that_is_gone_is_named(tmp_path: Path) -> None:
    path = tmp_path / "frozen.safetensors"
    write_frozen(path, {}, {"kind": "gone"})
    with pytest.raises(
        UserError, match=rf"^{path}: its encoder is of kind 'gone'; there are encoders for stage"
    ):
        build_encoder(Vision(init="x"), None, path)
