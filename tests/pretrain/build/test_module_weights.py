"""Weights from a file into a module, bit for bit or refused; frozen tensors written and read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_pipeline.errors import UserError
from pretrain.build.module_weights import (
    LoadReport,
    load_into,
    read_description,
    read_frozen,
    read_state,
    write_frozen,
)
from tests.support.recorded_files import recorded
from tests.support.tiny_models import multimodal


class Reader(nn.Module):
    """A small model with a module and a single tensor that a text-only stage lacks."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.llm = nn.Sequential(nn.Embedding(11, width), nn.BatchNorm1d(width))
        self.projector = nn.Linear(4, width)
        self.start_image = nn.Parameter(torch.randn(1, 1, width))
        self.logit_scale = nn.Parameter(torch.randn(1))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return set(found) == set(expected) and all(
        torch.equal(tensor, expected[name]) and tensor.dtype == expected[name].dtype
        for name, tensor in found.items()
    )


def test_everything_is_copied_and_nothing_else_reported() -> None:
    torch.manual_seed(0)
    source, model = Reader(), Reader()
    source.llm[1].running_mean.fill_(0.5)
    loaded = load_into(model, state_of(source), "x")
    assert same(state_of(model), state_of(source))  # buffers, too
    assert (loaded.new, loaded.unused) == ([], [])


def test_whole_modules_may_be_new_and_stay_as_initialised() -> None:
    torch.manual_seed(0)
    source, model = Reader(), Reader()
    before = state_of(model)
    state = {name: t for name, t in state_of(source).items() if name.startswith("llm.")}
    loaded = load_into(model, state | {"vision.0.conv1.weight": torch.zeros(3)}, "x")
    after = state_of(model)
    assert set(loaded.new) == {"projector.weight", "projector.bias", "start_image", "logit_scale"}
    assert loaded.unused == ["vision.0.conv1.weight"]
    assert same({n: after[n] for n in state}, state)
    assert same({n: after[n] for n in loaded.new}, {n: before[n] for n in loaded.new})


def test_a_scalar_fits_a_vector_of_one() -> None:
    model = Reader()
    load_into(model, state_of(Reader()) | {"logit_scale": torch.tensor(2.5)}, "x")
    assert model.logit_scale.tolist() == [2.5]


def refusal(model: nn.Module, state: dict[str, Tensor]) -> str:
    """The error text of a load that is refused and changes nothing."""
    before = state_of(model)
    with pytest.raises(UserError) as found:
        load_into(model, state, "runs/a/main")
    assert same(state_of(model), before)
    assert "runs/a/main" in str(found.value)
    return str(found.value)


def test_every_tensor_of_another_shape_is_named() -> None:
    text = refusal(Reader(6), state_of(Reader(8)))
    for name, theirs, ours in (
        ("llm.0.weight", "(11, 8)", "(11, 6)"),
        ("projector.bias", "(8,)", "(6,)"),
        ("start_image", "(1, 1, 8)", "(1, 1, 6)"),
    ):
        assert f"{name}: {theirs} in the weights, {ours} in the model" in text
    # The transpose has the same number of elements and another shape.
    turned = state_of(Reader())
    turned["projector.weight"] = turned["projector.weight"].T.contiguous()
    assert "projector.weight: (4, 6) in the weights, (6, 4) in the model" in refusal(Reader(), turned)


def test_a_module_that_is_there_in_part_is_refused() -> None:
    state = state_of(Reader())
    del state["projector.bias"], state["llm.0.weight"]
    text = refusal(Reader(), state)
    assert "projector.bias: missing in the weights" in text
    assert "llm.0.weight: missing in the weights" in text
    assert "start_image" not in text


class Layers(nn.Module):
    """A language model of some layers, with a head that may be tied to its embedding, and a module of its own."""

    def __init__(self, layers: int, module: str = "projector", tied: bool = False) -> None:
        super().__init__()
        self.llm = nn.Module()
        self.llm.embed = nn.Embedding(5, 3)
        self.llm.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)) for _ in range(layers)
        )
        self.llm.head = nn.Linear(3, 5, bias=False)
        if tied:
            self.llm.head.weight = self.llm.embed.weight
        self.add_module(module, nn.Linear(2, 3))


def test_layers_that_the_model_lacks_are_refused_and_named() -> None:
    """Three layers into one; beside them a whole module may be new, and a whole module unused."""
    state, model = state_of(Layers(3, "text")), Layers(1)
    text = refusal(model, state)
    assert "llm.layers.{1..2}.* (8 tensors): not used by the model" in text
    assert "text." not in text
    assert "projector" not in text
    assert "init_allow" not in text  # only a stage's init can be allowed
    with pytest.raises(UserError) as found:
        load_into(model, state, "x", [])
    assert str(found.value).endswith(r"write init_allow: ['llm\.layers\.(1|2)\..*']")
    loaded = load_into(model, state, "x", [r"llm\.layers\.(1|2)\..*"])
    assert set(loaded.unused) == {
        n for n in state if n.startswith(("text.", "llm.layers.1.", "llm.layers.2."))
    }
    assert set(loaded.new) == {"projector.weight", "projector.bias"}
    assert same(
        {n: t for n, t in state_of(model).items() if n in state},
        {n: state[n] for n in state_of(model) if n in state},
    )


def test_the_line_to_write_allows_what_differs_and_keeps_what_was_allowed() -> None:
    """One layer into three, with another head: what is new and what is unused, both in part."""
    state, model = state_of(Layers(1)), Layers(3)
    state["llm.extra.weight"] = torch.zeros(2)
    allow = [r"llm\.layers\.1\..*"]
    with pytest.raises(UserError) as found:
        load_into(model, state, "x", allow)
    text = str(found.value)
    assert "llm.layers.2.* (4 tensors): missing in the weights" in text
    assert "llm.extra.weight: not used by the model" in text
    assert "layers.1" not in text.partition("init_allow")[0]
    allowed = yaml.safe_load(text.partition("write ")[2])["init_allow"]
    assert allowed[0] == allow[0]
    report = load_into(model, state, "x", allowed)
    assert (len(report.new), report.unused) == (8, ["llm.extra.weight"])
    with pytest.raises(UserError, match=r"llm\.layers\.1"):  # no expression but the whole name counts
        load_into(model, state, "x", [*allowed[1:], r"llm\.layers"])


def test_shapes_are_never_allowed() -> None:
    with pytest.raises(UserError, match=r"llm.0.weight: \(11, 8\) in the weights"):
        load_into(Reader(6), state_of(Reader(8)), "x", [r".*"])


def test_a_tied_weight_may_be_stored_under_any_of_its_names() -> None:
    names = ["llm.embed.weight", "llm.head.weight"]
    for stored in (names[:1], names[1:], names):
        source, model = Layers(1, tied=True), Layers(1, tied=True)
        state = {name: t for name, t in state_of(source).items() if name not in names or name in stored}
        assert load_into(model, state, "x") == LoadReport([], [])
        assert torch.equal(model.llm.embed.weight, source.llm.embed.weight)


def test_two_weights_do_not_become_one_in_silence() -> None:
    text = refusal(Layers(1, tied=True), state_of(Layers(1)))
    assert "llm.head.weight: differs from llm.embed.weight, with which the model shares it" in text


def test_weights_of_something_else_are_refused() -> None:
    assert "no tensor of the model is in the weights" in refusal(Reader(), {"visual.proj": torch.zeros(2)})
    assert "no tensor of the model is in the weights" in refusal(Reader(), {})


def test_a_long_list_of_differences_is_cut_short() -> None:
    model = nn.ModuleDict({f"m{n}": nn.Linear(2, 2) for n in range(20)})
    state = {name: torch.zeros(3, 3, 3) for name in model.state_dict()}
    text = refusal(model, state)
    assert text.count(" in the weights") == 20
    assert "... and 20 more" in text
    exactly_listed = nn.ModuleDict({f"m{n}": nn.Linear(2, 2) for n in range(10)})
    assert " more" not in refusal(exactly_listed, {name: state[name] for name in exactly_listed.state_dict()})


def many_types() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randn(7, 5, generator=generator)
    return {
        "fp32": numbers,
        "bf16": numbers.bfloat16(),
        "fp16": numbers.half(),
        "fp64": numbers.double(),
        "ints": torch.arange(-3, 9, dtype=torch.int64).reshape(3, 4),
        "bools": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.25),
        "special": torch.tensor([float("inf"), -0.0, 1e-45]),
    }


def test_weights_are_read_as_safetensors_itself_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(many_types(), path)
    found = read_state(str(path))
    assert same(found, load_file(path))
    assert {name: tuple(t.shape) for name, t in found.items()} == {
        name: tuple(t.shape) for name, t in many_types().items()
    }


def test_frozen_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "frozen.safetensors"
    tensors = many_types()
    tensors["turned"] = tensors["fp32"].T  # not contiguous
    tensors["trained"] = torch.nn.Parameter(torch.ones(2))
    described = {"clip": {"embed_dim": 16, "vision_cfg": {"width": 32, "head": None}}}
    write_frozen(path, tensors, described)
    found, description = read_frozen(path), read_description(path)
    assert same(found, {name: t.detach() for name, t in tensors.items()})
    assert description == described
    assert list(tmp_path.iterdir()) == [path]
    assert same(load_file(path), found)  # a plain safetensors file

    write_frozen(path, {"only": torch.ones(1)}, {})  # replaces the whole file
    assert list(read_frozen(path)) == ["only"]
    assert read_frozen(tmp_path / "none.safetensors") == read_description(tmp_path / "none.safetensors") == {}


def test_frozen_tensors_are_absent_or_whole_after_a_power_cut_and_stay(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    first, second = {"w": torch.arange(6.0)}, {"w": torch.ones(6)}
    with recorded(root) as disk:
        for number, tensors in enumerate((first, second)):
            write_frozen(root / "frozen.safetensors", tensors, {"number": number})
            disk.promise(str(number))
    for outcome in disk.outcomes():
        outcome.write(tmp_path / "cut")
        path = tmp_path / "cut/frozen.safetensors"
        found, description = read_frozen(path), read_description(path)
        if found:
            assert torch.equal(found["w"], (first, second)[description["number"]]["w"])
        assert description.get("number", -1) >= len(outcome.promised) - 1, outcome.after


def test_a_connector_of_an_earlier_version_has_its_old_name() -> None:
    model = multimodal()
    old = {
        name.replace("connector.0.linear", "projector.0").replace("connector.0.norm", "projector.1"): tensor
        + 1
        for name, tensor in state_of(model).items()
    }
    assert sum(name.startswith("projector.") for name in old) == 4
    expected = {name: tensor + 1 for name, tensor in state_of(model).items()}
    report = load_into(model, old, "old")
    assert (report.new, report.unused) == ([], [])
    assert same(state_of(model), expected)


def test_a_wrong_shape_has_no_advice_about_names() -> None:
    text = refusal(Reader(6), state_of(Reader(8)))
    assert "None" not in text
    assert "init_allow" not in text
