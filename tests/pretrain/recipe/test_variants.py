"""Sections whose keys depend on one of them, and the dicts behind them: both halves of each have the same names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from pydantic import BeforeValidator, ValidationError

from data_pipeline.errors import UserError
from pretrain.build.objective import BUILDERS
from pretrain.evaluate.suite import EVALUATIONS
from pretrain.models.connectors import CONNECTORS
from pretrain.models.language_models import LANGUAGE_MODELS
from pretrain.recipe.dump import as_plain
from pretrain.recipe.kinds import KINDS
from pretrain.recipe.kinds.base import ObjectiveOptions
from pretrain.recipe.kinds.parse import parse_objective
from pretrain.recipe.load import load_recipe
from pretrain.recipe.resolve import merge_maps
from pretrain.recipe.schema import TrainStage
from pretrain.recipe.sections.evaluation import TASKS, Evaluation, Perplexity, ZeroShot
from pretrain.recipe.sections.model import CONNECTOR_KINDS, LinearConnector, Llm
from pretrain.recipe.sections.text_formats import TEXT_FORMATS, CaptionOptions
from tests.support import tiny


def test_what_a_recipe_can_name_can_be_built() -> None:
    assert set(KINDS) == set(BUILDERS)
    assert set(CONNECTOR_KINDS) == set(CONNECTORS)
    assert set(LANGUAGE_MODELS) <= set(Llm.model_fields)
    assert set(TASKS) <= set(EVALUATIONS)
    for name, task in TASKS.items():
        assert EVALUATIONS[name].needs == task.needs


@pytest.mark.parametrize("name", [name for name, options in TEXT_FORMATS.items() if options.available])
def test_a_format_gives_the_arrays_that_its_section_promises(name: str) -> None:
    options = TEXT_FORMATS[name].model_validate({"format": name, "length": 9})
    made = options.row_format()
    assert set(made.arrays) == set(options.arrays)
    assert (made.length, made.tokenizer) == (9, options.tokenizer_name)


@pytest.mark.parametrize("name", [name for name, options in TEXT_FORMATS.items() if not options.available])
def test_a_format_that_is_not_there_yet_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"text\.format: {name} is not available yet"):
        TEXT_FORMATS[name].model_validate({"format": name, "length": 9}).row_format()


CAPTION = {"tokenizer": "words", "length": 40, "captions": {"from": ["txt"]}}


@pytest.mark.parametrize(
    ("base", "over", "expected"),
    [
        (CAPTION, {"length": 9}, CAPTION | {"length": 9}),
        (CAPTION, {"format": "caption"}, CAPTION | {"format": "caption"}),
        (CAPTION, {"format": "packed"}, {"format": "packed", "length": 40}),
        ({"format": "packed", "length": 40}, {"format": "caption"}, {"format": "caption", "length": 40}),
        (CAPTION, {"format": "nothing"}, {"format": "nothing"}),
    ],
)
def test_another_format_drops_the_keys_that_only_the_old_one_has(
    base: dict[str, Any], over: dict[str, Any], expected: dict[str, Any]
) -> None:
    merged = merge_maps({"data": {"pairs": {"text": base}}}, {"data": {"pairs": {"text": over}}})
    assert merged["data"]["pairs"]["text"] == expected
    # A stream that is called text is no text section.
    stream = merge_maps(
        {"data": {"text": {"batch": 4, "lanes": 2}}}, {"data": {"text": {"format": "packed"}}}
    )
    assert stream["data"]["text"] == {"batch": 4, "lanes": 2, "format": "packed"}


def refused(root: Path, *overrides: str) -> str:
    path = tiny.write_recipe(root / "recipe.yaml", tiny.sphinx_recipe(root))
    with pytest.raises(UserError) as found:
        load_recipe(path, overrides)
    return str(found.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "data.text.length=9",
            "data.text.length: unknown key; the length belongs to text: {length: ...}, and {format: packed",
        ),
        (
            "data.text.text.format=pakced",
            "'pakced' is none of caption, packed, dialogue, prefix_suffix; did you mean",
        ),
        ("data.text.text.tokenizer=words", "unknown key of this text.format; it is a key of caption"),
        ("data.text.text.format=[packed]", "['packed'] is none of caption"),
        (
            "data.captions.text.format=dialogue",
            "data.captions.text.format: dialogue is not available yet",
        ),
        ("data.text.image={}", "data.text.image: does not go with text.format packed"),
        ("data.captions.text={format: packed, length: 9}", "data.captions.image: does not go with"),
        ("model.vision.patch=4", "model.vision.0.patch: has no effect beside init: flip/main; leave it out"),
        (
            "model.vision={width: 8, layers: 1, patch: 4}",
            "model.vision.0: needs init, the address of a trained tower",
        ),
        (
            "model.vision={arch: 'open_clip://ViT-B-16'}",
            "model.vision: a vision tower that was not trained by a dromos",
        ),
        ("model.connector=null", "model.connector: is missing; write connector: {kind: linear, norm: true}"),
        ("model.connector.kind=qformer", "model.connector.kind: 'qformer' is none of linear"),
        ("model.connector.nrom=true", "unknown key; did you mean 'norm'?"),
        (
            "eval.perplexity.held={path: x, lenght: 9}",
            "eval.perplexity.held.lenght: unknown key; did you mean 'length'",
        ),
        (
            "eval.perplexity.held={length: nine, path: [x]}",
            "eval.perplexity.held.path: must be text, not ['x']",
        ),
        ("eval.perplexty.held.path=x", "eval.perplexty: unknown key; did you mean 'perplexity'?"),
        ("eval.perplexity=x", "eval.perplexity: must be a map"),
        ("eval.perplexity={path: x, stream: captions}", "eval.perplexity.path: needs exactly one of stream"),
        (
            "eval.perplexity={a: {path: x, stream: captions, length: 9}}",
            "eval.perplexity.a: needs exactly one of stream",
        ),
        (
            "data.captions.image=null",
            "data.captions.image: is missing; generative needs the images of this stream",
        ),
        (
            "data.captions.text=null",
            "data.captions.text: is missing; generative needs the text of this stream",
        ),
        ("eval.zero_shot={held: x}", "eval.zero_shot: needs an image tower and a text tower"),
    ],
)
def test_a_mistake_is_said_at_its_key(tmp_path: Path, override: str, words: str) -> None:
    assert words in refused(tmp_path, override)


def test_all_mistakes_of_a_task_are_said(tmp_path: Path) -> None:
    lines = refused(tmp_path, "eval.perplexity={a: {path: x, stream: 3}, b: {length: 1}}").splitlines()
    assert len(lines) == 3
    for words in ("a.stream: must be text", "b.path: is missing", "b.length: must be greater than 1"):
        assert any(f"eval.perplexity.{words}" in line for line in lines), (words, lines)


def test_tasks_keep_their_class_through_a_resolved_recipe(tmp_path: Path) -> None:
    sections = tiny.sphinx_recipe(tmp_path)
    sections["eval"] = {
        "every": 2,
        "perplexity": {"a": {"path": "x", "stream": "captions"}, "b": {"path": "y", "length": 9}},
    }
    plain = as_plain(load_recipe(tiny.write_recipe(tmp_path / "recipe.yaml", sections)))
    again = TrainStage.model_validate(yaml.safe_load(yaml.safe_dump(plain))["stages"]["main"])
    assert again.eval.of(Perplexity) == {
        "a": Perplexity(path="x", stream="captions"),
        "b": Perplexity(path="y", length=9),
    }
    assert again.eval.of(ZeroShot) == {}
    assert [(key, name, task.path) for key, name, task in again.eval.tasks()] == [
        ("perplexity", "a", "x"),
        ("perplexity", "b", "y"),
    ]
    assert plain["stages"]["main"]["data"]["text"]["text"] == {"format": "packed", "length": tiny.LENGTH}
    assert plain["stages"]["main"]["model"]["connector"] == {"kind": "linear", "norm": True}


def test_a_path_alone_is_a_task() -> None:
    given = Evaluation.model_validate({"perplexity": {"a": "data/held"}})
    assert given.of(Perplexity) == {"a": Perplexity(path="data/held")}


def test_a_selector_that_is_null_is_the_default(tmp_path: Path) -> None:
    found = load_recipe(
        tiny.write_recipe(tmp_path / "recipe.yaml", tiny.sphinx_recipe(tmp_path)),
        ["model.connector={kind: null, norm: true}", "data.captions.text={format: null, length: 9}"],
    ).stages["main"]
    assert isinstance(found, TrainStage)
    assert found.model.connector == LinearConnector(norm=True)
    assert found.data["captions"].text == CaptionOptions(length=9)


def test_a_contrastive_stage_has_no_connector(tmp_path: Path) -> None:
    path = tiny.write_recipe(tmp_path / "recipe.yaml", tiny.flip_recipe(tmp_path))
    with pytest.raises(UserError, match=r"model\.connector: is not used by contrastive"):
        load_recipe(path, ["model.connector.norm=true"])
    for part in ("image", "text"):
        with pytest.raises(
            UserError, match=rf"data\.pairs\.{part}: is missing; contrastive needs the {part}"
        ):
            load_recipe(path, [f"data.pairs.{part}=null"])


def test_tasks_of_one_kind_are_not_those_of_its_subclass(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Perplexity):
        options: Annotated[ObjectiveOptions, BeforeValidator(parse_objective)] | None = None

    monkeypatch.setitem(TASKS, "other", Other)
    mine = {"a": {"path": "x", "length": 9}}
    found = Evaluation.model_validate({"perplexity": {"a": {"path": "y", "length": 3}}, "other": mine})
    assert found.of(Perplexity) == {"a": Perplexity(path="y", length=3)}
    assert found.of(Other) == {"a": Other(path="x", length=9)}
    with pytest.raises(ValidationError, match="'nothing' is none of contrastive, generative"):
        Evaluation.model_validate({"other": {"a": {"path": "x", "options": {"kind": "nothing"}}}})
