"""The strict YAML reader: messages with line numbers, and equal results of both parsers."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from data_pipeline.errors import UserError
from pretrain.recipe import yaml_file
from pretrain.recipe.resolve import parse_override
from pretrain.recipe.yaml_file import load_yaml, whole_value
from tests.pretrain.recipe.test_recipe import CONFIGS, ROOT, write

MISTAKES = {
    "a: 1\nb: [}\n": ":2: .*found '}'",
    "a: 1\na: 2\n": ":2: the key 'a' is written twice",
    "a: 1\nb: @x\n": ":2: found character '@'",
    "a: 1\nb: *x\n": ":2: found undefined alias 'x'",
    "a: 1\nb: &x [*x]\n": ":2: found unconstructable recursive node",
    "a: 1\nb: !!python/name:os.x 1\n": ":2: could not determine a constructor",
    "a: " + "[" * 200_000: "not YAML: maximum recursion depth",
    "a:\n " + "- " * 200_000: "not YAML: maximum recursion depth",
    "a: " + "[" * 1900 + "]" * 1900: "not YAML: maximum recursion depth",
}


@pytest.mark.parametrize("text", MISTAKES, ids=lambda text: text[:20])
def test_mistakes_in_the_yaml_are_named_with_their_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=MISTAKES[text]):
        load_yaml(write(tmp_path, text))


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML was built without libyaml")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_both_parsers_read_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert issubclass(yaml_file._FastLoader, yaml.CSafeLoader)
    fast = load_yaml(path)
    monkeypatch.setattr(yaml_file, "_FastLoader", yaml_file._Loader)
    assert fast == load_yaml(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("/x/set #1", "/x/set #1"),
        ("/x/my set #1 #2/{0..3}.tar", "/x/my set #1 #2/{0..3}.tar"),
        ("#1", "#1"),
        (" #1 ", "#1"),
        ("a#b", "a#b"),
        ('"a #1"', "a #1"),
        ("/x/a & b!", "/x/a & b!"),
        ("5", 5),
        ("1e-4", 1e-4),
        ("null", None),
        ("{path: '/x #1', weight: 2}", {"path": "/x #1", "weight": 2}),
    ],
)
def test_a_value_on_the_command_line_is_taken_whole(text: str, value: object) -> None:
    """YAML alone would drop ` #1`, as it does in a file."""
    assert whole_value(text) == value


@pytest.mark.parametrize(
    "text", ["5 # five", "{a: 1} # c", '"a" #1', "&a b", "[a, # b\n c]", "a: 1 #x", "&a"]
)
def test_a_value_of_which_yaml_keeps_less_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a comment, an anchor or a tag; write the value in quotes"):
        whole_value(text)


def test_an_override_keeps_its_number_sign() -> None:
    assert parse_override("data.pairs.sources.a.path=/x/set #1", ["main"]).value == "/x/set #1"
    with pytest.raises(UserError, match=r"override 'train\.steps=5 # five': .*in quotes"):
        parse_override("train.steps=5 # five", ["main"])
